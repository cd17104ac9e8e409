"""What joins models/ to utils/ for main.py and detect_main.py: networks built, placed, recorded."""
