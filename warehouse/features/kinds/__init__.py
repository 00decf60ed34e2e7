"""Features that are no aggregation of events: of the request itself, of a batch table, of an HTTP call."""
