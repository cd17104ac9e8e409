"""Studies over many runs: plans, parts of the data, statistics, tables, pictures."""
