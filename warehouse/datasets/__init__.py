"""Sources of imported history: adapters for public data sets and the seeded simulator."""
