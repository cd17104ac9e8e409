"""A run's folder: checkpoints, resuming, logs, commands. Knows no training step."""
