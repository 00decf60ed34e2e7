"""The command line: dispatches to the rooms and knows nothing else."""
