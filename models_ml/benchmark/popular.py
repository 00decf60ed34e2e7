"""The most frequent items, the same for everybody: what any model must beat."""

import numpy as np

from models_ml.benchmark.sequences import Sequences


class Popular:
    """Scores are how often an item occurs in what was learned from."""

    def __init__(self, learned: Sequences):
        self._count_I = np.bincount(learned.items_P, minlength=learned.num_items).astype(np.float32)

    def scores(self, histories: Sequences, users_Q: np.ndarray) -> np.ndarray:
        """float32 [Q, I], all rows alike."""
        return np.tile(self._count_I, (len(users_Q), 1))
