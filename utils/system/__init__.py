"""The process and its surroundings: errors, files, signals, other processes, text."""

VERSION = "1.0.0"  # of this repository: args.json and the checkpoints of each run record it
