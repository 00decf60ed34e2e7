"""Rows of a layer's outputs, kept from request to request for as long as what they are made of stays the same.

Between two ticks a note's block features never change, and most readers have met few authors: the same few rows of features
come again and again. Nothing here knows of ticks or keys: a row is found by its features, and used only where they are the same
bit for bit. Places are in sets of `WAYS`: a row may be in any place of its set, and a new one takes the oldest.
N rows asked for, S places to keep them in, F features, W outputs.
"""

import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

PLACES, WAYS = 16384, 4
"""Powers of two. With 4 members of 96 units a place is 1.5 KB, and 4 bytes a feature; places never used cost no memory."""

WORTHWHILE, PATIENCE, PAUSE = 0.25, 4, 28
"""Looking costs about half of what making a row does: where less than this share is found PATIENCE times in turn, the next
PAUSE requests are made without looking."""


class RowMemo:
    """Safe for threads. make: features float32 [N, F] -> float32 [N, W], each row from its own features alone."""

    def __init__(self, num_features: int, width: int, make: Callable[[np.ndarray], Tensor], places: int = PLACES):
        self._make, self._lock = make, threading.Lock()
        self._factors_F = np.random.default_rng(0).integers(1, 1 << 62, num_features) | 1
        self._num_sets = places // WAYS
        self._hash_S = np.zeros((self._num_sets, WAYS), dtype=np.int64)  # 0 is free: no row has it
        self._oldest_of_set = np.zeros(self._num_sets, dtype=np.int64)
        self._bits_SF = np.empty((places, num_features), dtype=np.int32)
        self._rows_SW = torch.empty(places, width)
        self._num_poor, self._pause = 0, 0

    def fill(self, rows_NW: Tensor, features_NF: np.ndarray) -> None:
        """Writes the row of each row of features, float32 and contiguous."""
        if self._pause > 0:  # a count that threads may get a little wrong
            self._pause -= 1
            rows_NW.copy_(self._make(features_NF))
            return
        bits_NF = features_NF.view(np.int32)  # as bits NULL equals NULL
        hash_N = (bits_NF @ self._factors_F) | 1
        set_N = (hash_N >> 32) & (self._num_sets - 1)
        with self._lock:
            same_NV = self._hash_S[set_N] == hash_N[:, None]
            place_N = set_N * WAYS + same_NV.argmax(1)
            is_known_N = same_NV.any(1) & (self._bits_SF.take(place_N, 0) == bits_NF).all(1)
            if is_known_N.any():
                torch.index_select(self._rows_SW, 0, torch.from_numpy(place_N), out=rows_NW)
        missing_M = np.flatnonzero(~is_known_N)
        self._num_poor = self._num_poor + 1 if len(missing_M) > (1 - WORTHWHILE) * len(rows_NW) else 0
        if self._num_poor == PATIENCE:
            self._num_poor, self._pause = 0, PAUSE
        if len(missing_M) == len(rows_NW):
            rows_NW.copy_(self._make(features_NF))
            self._keep(hash_N, bits_NF, rows_NW)
        elif len(missing_M):
            made_MW = self._make(features_NF[missing_M])
            rows_NW.index_copy_(0, torch.from_numpy(missing_M), made_MW)
            self._keep(hash_N[missing_M], bits_NF[missing_M], made_MW)

    def forget(self) -> None:
        """Empties all places."""
        with self._lock:
            self._hash_S[:] = 0
            self._oldest_of_set[:] = 0

    def _keep(self, hash_M: np.ndarray, bits_MF: np.ndarray, made_MW: Tensor) -> None:
        hashes, row = np.unique(hash_M, return_index=True)
        sets = (hashes >> 32) & (self._num_sets - 1)
        by_set = sets.argsort(kind="stable")
        sets, hashes, row = sets[by_set], hashes[by_set], row[by_set]
        place_in_set = np.arange(len(sets)) - np.searchsorted(sets, sets)
        fits = place_in_set < WAYS
        sets, hashes, row, place_in_set = sets[fits], hashes[fits], row[fits], place_in_set[fits]
        with self._lock:
            way = (self._oldest_of_set[sets] + place_in_set) % WAYS
            np.add.at(self._oldest_of_set, sets, 1)
            place = sets * WAYS + way
            self._hash_S[sets, way], self._bits_SF[place] = hashes, bits_MF[row]
            if len(row) == len(made_MW):
                place_of_M = np.empty_like(place)
                place_of_M[row] = place
                self._rows_SW.index_copy_(0, torch.from_numpy(place_of_M), made_MW)
            else:
                self._rows_SW.index_copy_(0, torch.from_numpy(place), made_MW.index_select(0, torch.from_numpy(row)))
