"""Masks lent to requests are those of the instant and the reader, whatever was lent before."""

import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serving.catalogue import UNKNOWN_US
from serving.showable import Showable


@given(st.lists(st.tuples(st.integers(0, 12), st.lists(st.integers(0, 9), max_size=4)), max_size=12), st.integers(0, 1000))
def test_what_is_lent_does_not_hang_from_what_was(asked, seed):
    rng = np.random.default_rng(seed)
    created_us_N = rng.choice([UNKNOWN_US, 3, 5, 5, 9], 10)
    allowed_N = rng.random(10) < 0.8
    showable = Showable(created_us_N, allowed_N)
    for t_us, rows in asked:
        expected = [created_us_N[row] < t_us and allowed_N[row] and row not in rows for row in range(10)]
        with showable.without(t_us, np.array(rows, np.int64)) as lent_N:
            assert lent_N.tolist() == expected
            with showable.without(t_us, np.empty(0, np.int64)) as other_N:  # while the first is away
                assert other_N.tolist() == ((created_us_N < t_us) & allowed_N).tolist()
            assert lent_N.tolist() == expected


def test_a_mask_comes_back_whole_after_an_error():
    showable = Showable(np.zeros(4, np.int64), np.ones(4, bool))
    try:
        with showable.without(1, np.array([2])):
            raise RuntimeError("generator torn")
    except RuntimeError:
        pass
    with showable.without(1, np.array([0])) as lent_N:
        assert lent_N.tolist() == [False, True, True, True]


def test_readers_at_once_have_masks_of_their_own():
    showable, wrong = Showable(np.zeros(50, np.int64), np.ones(50, bool)), []

    def ask(seed):
        rng = np.random.default_rng(seed)
        for _ in range(300):
            rows = rng.integers(0, 50, 5)
            with showable.without(1, rows) as lent_N:
                if np.flatnonzero(~lent_N).tolist() != sorted({*rows.tolist()}):
                    wrong.append(rows)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
