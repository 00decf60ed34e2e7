"""Rows that are kept are those that would be made again."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from models_ml.first_layer import distinct
from models_ml.row_memo import RowMemo

BYTES_OF_A_PLACE = 4 * (3 + 2 + 2)


def _features(rows, seed=0):
    values = np.random.default_rng(seed).integers(0, 50, (rows, 2)).astype(np.float32)
    values[::7, 1] = np.nan
    return values


class _Maker:
    """The numbers and NULLs, and the tag."""

    def __init__(self):
        self.asked = 0

    def __call__(self, features_MB, tag_M):
        self.asked += len(features_MB)
        return np.ascontiguousarray(np.nan_to_num(features_MB, nan=-1.0) + 100 * tag_M[:, None], dtype=np.float32)


def _memo(make, places):
    return RowMemo(2, 2, make, places * BYTES_OF_A_PLACE)


def _filled(memo, numbers, features_NB, tags=None, stamps=None):
    rows_NW = np.full((len(features_NB), 2), np.nan, dtype=np.float32)
    tag_N, stamp_N = (np.array([0] * len(features_NB) if some is None else some, dtype=np.int64) for some in (tags, stamps))
    memo.fill(rows_NW, np.array(numbers, dtype=np.int64), tag_N, stamp_N, lambda places_M: features_NB[places_M])
    return rows_NW


def _made(features_NB, tags=None):
    return _Maker()(features_NB, np.zeros(len(features_NB), dtype=np.int64) if tags is None else np.array(tags))


def test_a_row_is_made_once_and_again_when_a_feature_or_its_tag_changes():
    make = _Maker()
    memo, features, numbers = _memo(make, 256), _features(20), np.arange(20) * 5
    assert np.array_equal(_filled(memo, numbers, features), _made(features))
    assert np.array_equal(_filled(memo, numbers[::-1], features[::-1].copy()), _made(features[::-1]))
    assert (make.asked, len(memo), memo.num_hits, memo.num_misses) == (20, 20, 20, 20)
    features[3, 1] += 100
    assert np.array_equal(_filled(memo, numbers, features), _made(features))
    assert make.asked == 21
    tags = [0] * 19 + [4]
    for _ in range(2):
        assert np.array_equal(_filled(memo, numbers, features, tags), _made(features, tags))
        assert make.asked == 22
    memo.forget()
    assert len(memo) == 0
    assert np.array_equal(_filled(memo, numbers, features, tags), _made(features, tags))
    assert (make.asked, len(memo)) == (42, 20)


def test_features_whose_stamp_is_known_are_not_looked_at():
    make = _Maker()
    memo, features, numbers = _memo(make, 8), _features(3), [0, 1, 2]
    assert np.array_equal(_filled(memo, numbers, features, stamps=[5, 5, 0]), _made(features))
    seen = []

    def asked(stamps):
        rows_NW = np.empty((3, 2), dtype=np.float32)
        tag_N, seen[:] = np.zeros(3, dtype=np.int64), []
        memo.fill(
            rows_NW, np.array(numbers), tag_N, np.array(stamps), lambda places_M: (seen.extend(places_M), features[places_M])[1]
        )
        assert np.array_equal(rows_NW, _made(features))
        return list(seen)

    assert asked([5, 5, 0]) == [2]
    assert asked([5, 6, 6]) == [1, 2]  # found by their bits, and stamped anew
    assert asked([5, 6, 6]) == []
    assert asked([6, 6, 6]) == [0]
    assert make.asked == 3
    features[1] += 1
    assert asked([6, 7, 6]) == [1]
    assert make.asked == 4
    memo.forget()
    assert asked([6, 7, 6]) == [0, 1, 2]


def test_rows_that_are_remade_are_found_by_their_new_stamp_once_they_are_kept():
    make = _Maker()
    memo, features, numbers = _memo(make, 4000), _features(3000), np.arange(3000)
    tags = numbers % 7
    _filled(memo, numbers[::2], features[::2].copy(), tags[::2], np.full(1500, 5))
    expected = tags.copy()
    expected[10] += 1
    assert memo.kept(expected).tolist() == [number for number in range(0, 3000, 2) if number != 10]
    assert memo.kept(tags[:8]).tolist() == [0, 2, 4, 6]

    old, new, some, of_some = features[::2].copy(), features[::2] + 1, numbers[::2], tags[::2]
    keep = memo.remade(some, of_some, np.full(1500, 6), lambda places_M: new[places_M])
    assert np.array_equal(_filled(memo, some, old, of_some, np.full(1500, 5)), _made(old, of_some))
    keep()
    asked = make.asked
    assert np.array_equal(_filled(memo, some, new, of_some, np.full(1500, 6)), _made(new, of_some))
    assert (make.asked, len(memo)) == (asked, 1500)


def test_rows_that_have_their_stamp_are_not_made_again():
    make = _Maker()
    memo, features, tags = _memo(make, 100), _features(20), np.zeros(20, dtype=np.int64)
    _filled(memo, np.arange(20), features, tags, np.full(20, 5))
    changed, stamps = np.array([3, 11]), np.full(20, 5)
    features[changed], stamps[changed] = features[changed] + 1, 6
    asked = make.asked
    memo.remade(np.arange(20), tags, stamps, lambda places_K: features[places_K])()
    assert make.asked == asked + 2
    assert np.array_equal(_filled(memo, np.arange(20), features, tags, stamps), _made(features, tags))
    assert make.asked == asked + 2


def test_what_is_remade_is_not_kept_after_all_was_forgotten():
    memo, features = _memo(_Maker(), 8), _features(3)
    keep = memo.remade(np.arange(3), np.zeros(3, dtype=np.int64), np.full(3, 6), lambda places_M: features[places_M])
    memo.forget()
    keep()
    assert memo.kept(np.zeros(3, dtype=np.int64)).tolist() == []
    assert len(memo) == 0


def test_a_row_of_zeros_that_was_never_made_is_not_taken_for_one_that_is_kept():
    make = _Maker()
    features = np.zeros((3, 2), dtype=np.float32)
    tags = [0, 0, 7]
    assert np.array_equal(_filled(_memo(make, 4), [0, 1, 2], features, tags), _made(features, tags))
    assert make.asked == 3


def test_a_row_without_a_number_is_made_each_time():
    make = _Maker()
    memo, features = _memo(make, 8), _features(3)
    for _ in range(2):
        assert np.array_equal(_filled(memo, [-1, 4, -1], features), _made(features))
    assert make.asked == 3 + 2


def test_no_columns_and_no_rows_are_filled():
    memo = RowMemo(0, 2, lambda features_MB, tag_M: np.ones((len(features_MB), 2), dtype=np.float32))
    assert np.array_equal(_filled(memo, [0, 1, 1], np.empty((3, 0), dtype=np.float32)), np.ones((3, 2)))
    assert _filled(memo, [], np.empty((0, 0), dtype=np.float32)).shape == (0, 2)


def test_more_rows_than_places_are_right_all_the_same():
    memo = _memo(_Maker(), 7)
    for seed in range(20):
        features, numbers = _features(60, seed), np.random.default_rng(seed).integers(0, 1 << 40, 60)
        assert np.array_equal(_filled(memo, numbers, features), _made(features))


def test_a_memo_takes_no_more_than_it_may():
    assert 0.99 * (1 << 20) < RowMemo(40, 384, _Maker(), 1 << 20).num_bytes <= 1 << 20


def test_threads_that_fill_and_replace_get_their_own_rows():
    memo = _memo(_Maker(), 16)
    asked = [(np.random.default_rng(seed).integers(0, 64, 50), _features(50, seed)) for seed in range(40)]
    with ThreadPoolExecutor(4) as threads:
        for (_, features), rows in zip(asked * 3, threads.map(lambda one: _filled(memo, *one), asked * 3), strict=True):
            assert np.array_equal(rows, _made(features))


def test_different_rows_are_told_apart_by_their_bits_in_the_order_of_coming():
    rng = np.random.default_rng(0)
    for rows, kinds in ((0, 1), (1, 1), (500, 1), (500, 3), (2200, 60), (300, 10_000)):
        values = rng.integers(0, kinds, (rows, 4)).astype(np.float32)
        values[values == 2] = np.nan
        values[values == 1] = -0.0
        group_N = rng.integers(0, 2, rows)
        place_N, first_M = distinct(values, np.array([3, 0]), group_N)
        bits = [(*row, group) for row, group in zip(values[:, [3, 0]].copy().view(np.int32).tolist(), group_N, strict=True)]
        expected = {row: place for place, row in enumerate(dict.fromkeys(bits))}
        assert place_N.tolist() == [expected[row] for row in bits]
        assert first_M.tolist() == [bits.index(row) for row in expected]
    assert distinct(values, np.array([], dtype=np.int64), np.zeros(rows, dtype=np.int64))[1].tolist() == [0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_places_that_were_never_used_cost_no_memory():
    def resident_bytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    memo = RowMemo(2, 2, _Maker())
    before = resident_bytes()
    numbers = np.arange(500) * (memo.num_bytes // BYTES_OF_A_PLACE // 500)  # all over it
    _filled(memo, numbers, _features(500))
    assert len(memo) == 500
    assert resident_bytes() - before < memo.num_bytes / 8
