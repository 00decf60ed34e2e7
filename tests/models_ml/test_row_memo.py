"""Rows that are kept are those that would be made again."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from models_ml.row_memo import PATIENCE, PAUSE, WAYS, RowMemo


def _features(rows, seed=0):
    values = np.random.default_rng(seed).integers(0, 50, (rows, 3)).astype(np.float32)
    values[::7, 1] = np.nan
    return values


class _Maker:
    def __init__(self):
        self.asked = 0

    def __call__(self, features_NF):
        self.asked += len(features_NF)
        return torch.from_numpy(np.nan_to_num(features_NF, nan=-1.0) @ np.arange(6, dtype=np.float32).reshape(3, 2))


def _filled(memo, features_NF):
    rows = torch.full((len(features_NF), 2), torch.nan)
    memo.fill(rows, features_NF)
    return rows


def test_a_row_is_made_once_and_again_when_a_feature_changes():
    make = _Maker()
    memo, features = RowMemo(3, 2, make, places=256), _features(20)
    expected = _Maker()(features)
    assert torch.equal(_filled(memo, features), expected)
    assert make.asked == len(np.unique(features, axis=0))
    made = make.asked
    assert torch.equal(_filled(memo, features[::-1].copy()), expected.flip(0))
    assert make.asked == made
    features[3, 2] += 100
    assert torch.equal(_filled(memo, features), _Maker()(features))
    assert make.asked == made + 1
    memo.forget()
    assert torch.equal(_filled(memo, features), _Maker()(features))
    assert make.asked > made + 1


def test_where_little_is_found_again_it_is_not_looked_for_a_while():
    make = _Maker()
    memo, kept = RowMemo(3, 2, make, places=4096), _features(5)
    _filled(memo, kept)  # the first that finds nothing
    for seed in range(1, PATIENCE):
        _filled(memo, _features(20, 100 + seed) + 1000)
    for _ in range(PAUSE):
        made = make.asked
        assert torch.equal(_filled(memo, kept), _Maker()(kept))
        assert make.asked == made + len(kept)
    made = make.asked
    assert torch.equal(_filled(memo, kept), _Maker()(kept))
    assert make.asked == made


def test_rows_of_no_features_and_no_rows_are_filled():
    memo = RowMemo(0, 2, lambda features_NF: torch.ones(len(features_NF), 2), places=8)
    assert torch.equal(_filled(memo, np.empty((3, 0), dtype=np.float32)), torch.ones(3, 2))
    assert _filled(memo, np.empty((0, 0), dtype=np.float32)).shape == (0, 2)


def test_more_rows_than_places_are_right_all_the_same():
    memo = RowMemo(3, 2, _Maker(), places=2 * WAYS)
    for seed in range(20):
        features = _features(60, seed)
        assert torch.equal(_filled(memo, features), _Maker()(features))


def test_rows_whose_hashes_are_equal_are_told_apart():
    memo, features = RowMemo(3, 2, _Maker(), places=4), _features(40)
    memo._factors_F[:] = 0
    for _ in range(2):
        assert torch.equal(_filled(memo, features), _Maker()(features))


def test_threads_that_fill_and_evict_get_their_own_rows():
    memo = RowMemo(3, 2, _Maker(), places=64)
    asked = [_features(50, seed) for seed in range(40)]
    with ThreadPoolExecutor(4) as threads:
        for features, rows in zip(asked * 3, threads.map(lambda features: _filled(memo, features), asked * 3), strict=True):
            assert torch.equal(rows, _Maker()(features))
