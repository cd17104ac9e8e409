"""The version of this repository; args.json and checkpoints of each run record it."""

VERSION = "1.0.0"
