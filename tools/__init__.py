"""Programs for data, runs and studies, started as `python -m tools.NAME`."""
