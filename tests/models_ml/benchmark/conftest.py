import numpy as np
import pytest
import torch

from models_ml.benchmark.sequences import Sequences


def of_lists(lists: list[list[int]], num_items: int) -> Sequences:
    lengths = [len(items) for items in lists]
    return Sequences(
        "toy",
        np.concatenate(lists).astype(np.int64),
        np.concatenate([[0], np.cumsum(lengths)]),
        tuple(map(str, range(num_items))),
    )


@pytest.fixture(scope="session")
def round_and_round() -> Sequences:
    """80 users walk up a circle of 40 items from places of their own, so the next item can be told from the last."""
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(0, 40, 80), rng.integers(3, 25, 80)
    return of_lists(
        [[(start + step) % 40 for step in range(length)] for start, length in zip(starts, lengths, strict=True)], 40
    )


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small only wait for one another's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
