"""Window features beside what a person would write by hand, in the same run on the same rows: `python -m bench.features`."""
