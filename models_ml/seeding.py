"""The same seed gives the same weights: one place that sets random state, algorithms and threads, and puts them back."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

TRAINING_THREADS = 1
"""Fixed, because sums split over another number of threads round differently."""


@contextmanager
def deterministic() -> Iterator[None]:
    """Inside, only deterministic algorithms run, on one thread; torch's CPU random state is put back after."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
    # algorithms are what matters; that nobody reads memory before writing it is for tests, and filling it costs a kernel each
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    threads, was_deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(TRAINING_THREADS)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was_deterministic)
            torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
            torch.set_num_threads(threads)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """`deterministic`, with the random state at `seed`."""
    with deterministic():
        torch.manual_seed(seed)
        yield
