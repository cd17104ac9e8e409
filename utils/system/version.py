"""Holds the version of this repository, which args.json and checkpoints of each run record."""

VERSION = "1.0.0"
