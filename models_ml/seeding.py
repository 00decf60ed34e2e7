"""The same seed gives the same weights: one place that sets random state, algorithms and threads, and puts them back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

TRAINING_THREADS = 1
"""Fixed, because sums split over another number of threads round differently."""


@contextmanager
def seeded(seed: int) -> Iterator[torch.Generator]:
    """Inside, torch's CPU random state starts at `seed` and only deterministic algorithms run; yields a generator for
    shuffling."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(TRAINING_THREADS)
        try:
            yield torch.Generator().manual_seed(seed)
        finally:
            torch.use_deterministic_algorithms(deterministic)
            torch.set_num_threads(threads)
