"""The process and its surroundings: errors, files, signals, other processes, text."""
