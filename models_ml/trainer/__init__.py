"""The trainer: rows in a stateless order, one loop for any number of ranks, checkpoints that survive a kill at any moment."""
