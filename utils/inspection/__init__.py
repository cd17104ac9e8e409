"""Looking at networks: predictions, channel weights, pictures, exported files."""
