"""Retrieval, L1 and L2 models: data loading, training, evaluation, export, registry."""
