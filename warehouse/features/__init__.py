"""Feature declarations, their SQL rendering and the oracle that judges every execution."""
