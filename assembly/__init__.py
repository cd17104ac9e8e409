"""Joins models/ to utils/ for main.py and detect_main.py: builds, places and records networks."""
