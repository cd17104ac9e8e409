"""Training settings as frozen values, and learning rates as pure functions."""
