"""Triton ops, each with its plain PyTorch reference."""
