"""The live side: event log, embedded runner, online store, RisingWave models."""
