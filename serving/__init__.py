"""The FastAPI cascade: retrieve, hydrate, L1, L2, policy, forward log, pages."""
