"""The lake and the batch side: Iceberg catalogue, landing, dbt models and macros, feature declarations."""
