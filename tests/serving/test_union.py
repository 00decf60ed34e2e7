"""The compiled union beside sorted sets and dictionaries."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models_ml.ordering import largest_first
from serving.union import Union


@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=5), st.sampled_from([1, 4096, 99_991]))
def test_the_union_is_reciprocal_rank_fusion(found, apart):
    """apart: rows of a large catalogue meet in the hash table, too."""
    union, shares = Union(sum(map(len, found)), len(found)), Counter()
    for generator, rows in enumerate(found):
        union.add(f"g{generator}", np.array(rows, np.int64) * apart)
        for rank, row in enumerate(dict.fromkeys(rows), start=1):
            shares[row * apart, generator] = 1.0 / (60 + rank)
        assert union.num_notes == len({row for row, _ in shares})
    total = Counter()
    for (row, _), share in shares.items():
        total[row] += share
    best = sorted(total, key=lambda row: (-total[row], row))
    row_C, score_C, share_CG = union.ranked()
    assert row_C.tolist() == best
    assert score_C.tolist() == [total[row] for row in best]
    of_best = [[shares[row, generator] for generator in range(len(found))] for row in best]
    np.testing.assert_array_equal(share_CG, np.array(of_best, np.float32).reshape(share_CG.shape))


def test_generators_that_were_not_asked_have_no_column():
    union = Union(4, 3)
    union.add("fresh", np.array([5, 2]))
    share_CG = union.ranked()[2]
    assert share_CG.tolist() == np.array([[1 / 61], [1 / 62]], np.float32).tolist()
    assert share_CG.flags.c_contiguous  # as compiled readers of it want


def test_a_generator_above_its_limit_is_refused():
    union = Union(3, 2)
    union.add("trending", np.array([1, 2]))
    with pytest.raises(ValueError, match="fresh found 2 notes"):
        union.add("fresh", np.array([3, 4]))


@pytest.mark.parametrize("num_values", [1, 5, 10_000])
def test_the_largest_come_first_and_ties_by_number(num_values):
    rng = np.random.default_rng(num_values)
    values, numbers = rng.integers(0, num_values, 2000) / 7, rng.permutation(2000)
    assert largest_first(values, numbers).tolist() == np.lexsort((numbers, -values)).tolist()
    assert largest_first(values[:0], numbers[:0]).tolist() == []
    assert largest_first(np.array([np.nan, 1.0, np.nan, 2.0]), np.arange(4)).tolist()[:2] == [3, 1]
