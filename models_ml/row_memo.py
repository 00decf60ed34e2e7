"""Rows of a layer's outputs, kept from request to request for as long as what they are made of stays the same.

Between two ticks a note's block features never change: the same rows of features come again and again. Nothing here knows of
ticks: a row has its place by its number, and is used only where the features that it was made of are the same bit for bit.
N rows asked for, M of them to be made, S places, B features that a row is made of, among the F given; W outputs.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numba import njit, types

from models_ml.request_inputs import only_read

NUM_BYTES = 256 << 20
"""What a memo may take; places that were never used cost no memory. With 4 members of 96 units a row takes 1.7 KB."""

_NUMBERS, _BITS = only_read(types.int64, 1), only_read(types.int32, 2)


class RowMemo:
    """Safe for threads. make: (features float32 [M, F], tags int64 [M]) -> float32 [M, W], each row from its own alone.

    columns: those of the features that a row is made of. num_hits, num_misses: rows found and made since the start.
    """

    def __init__(
        self,
        columns: Sequence[int],
        width: int,
        make: Callable[[np.ndarray, np.ndarray], np.ndarray],
        num_bytes: int = NUM_BYTES,
    ):
        self._make, self._lock = make, threading.Lock()
        self._columns_B = np.array(columns, dtype=np.int64)
        num_numbers = 2 + len(columns) + width
        self._places = max(1, num_bytes // (4 * num_numbers))
        # of a place: since when its row is kept (0: none is), the row's tag, its features' bits, its outputs' bits: side by
        # side, so that memory is asked once
        self._kept_SR = np.zeros((self._places, num_numbers), dtype=np.int32)
        self._since = 1
        self._num_kept = self.num_hits = self.num_misses = 0

    def __len__(self) -> int:
        """The rows that are kept."""
        return self._num_kept

    @property
    def num_bytes(self) -> int:
        """Of the places, those never used as well."""
        return self._kept_SR.nbytes

    def fill(self, rows_NW: np.ndarray, number_N: np.ndarray, tag_N: np.ndarray, features_NF: np.ndarray) -> None:
        """Writes the row of each row of features, all float32 and contiguous.

        number_N: int64, whose row it is; rows of one number, or of two that are a multiple of the places apart, take turns. One
        below 0 is made each time. tag_N: int64, what else a row is made of, not below 0.
        """
        bits_NF = features_NF.view(np.int32)  # as bits NULL equals NULL
        missing_N = np.empty(len(rows_NW), dtype=np.int64)
        kept = self._columns_B, self._kept_SR, self._kept_SR.view(np.float32)
        with self._lock:
            since = self._since
            num_missing = _find(since, number_N, tag_N, bits_NF, *kept, rows_NW, missing_N)
            self.num_hits += len(rows_NW) - num_missing
            self.num_misses += num_missing
        if not num_missing:
            return
        missing_M = missing_N[:num_missing]
        made_MW = self._make(features_NF[missing_M], tag_N[missing_M])
        with self._lock:
            num_new = _keep(since, missing_M, made_MW, number_N, tag_N, bits_NF, *kept, rows_NW)
            if since == self._since:
                self._num_kept += num_new

    def forget(self) -> None:
        """Empties all places."""
        with self._lock:
            self._since += 1
            self._num_kept = 0


@njit(
    types.int64(
        types.int64, _NUMBERS, _NUMBERS, _BITS, _NUMBERS, types.int32[:, ::1], types.float32[:, ::1], types.float32[:, ::1],
        types.int64[::1],
    ),
    cache=True,
    nogil=True,
)  # fmt: skip
def _find(
    since: int,
    number_N: np.ndarray,
    tag_N: np.ndarray,
    bits_NF: np.ndarray,
    columns_B: np.ndarray,
    kept_SR: np.ndarray,
    kept_as_floats_SR: np.ndarray,
    rows_NW: np.ndarray,
    missing_N: np.ndarray,
) -> int:
    """Writes the rows that are kept; the others' places into missing_N, and says how many."""
    num_missing, first_output = 0, 2 + len(columns_B)
    for n in range(len(number_N)):
        kept_R = kept_SR[number_N[n] % len(kept_SR)]
        is_same = number_N[n] >= 0 and kept_R[0] == since and kept_R[1] == tag_N[n]
        if is_same:
            for b in range(len(columns_B)):
                if bits_NF[n, columns_B[b]] != kept_R[2 + b]:
                    is_same = False
                    break
        if is_same:
            row_W = kept_as_floats_SR[number_N[n] % len(kept_SR), first_output:]
            for w in range(rows_NW.shape[1]):
                rows_NW[n, w] = row_W[w]
        else:
            missing_N[num_missing] = n
            num_missing += 1
    return num_missing


@njit(
    types.int64(
        types.int64, _NUMBERS, only_read(types.float32, 2), _NUMBERS, _NUMBERS, _BITS, _NUMBERS, types.int32[:, ::1],
        types.float32[:, ::1], types.float32[:, ::1],
    ),
    cache=True,
    nogil=True,
)  # fmt: skip
def _keep(
    since: int,
    missing_M: np.ndarray,
    made_MW: np.ndarray,
    number_N: np.ndarray,
    tag_N: np.ndarray,
    bits_NF: np.ndarray,
    columns_B: np.ndarray,
    kept_SR: np.ndarray,
    kept_as_floats_SR: np.ndarray,
    rows_NW: np.ndarray,
) -> int:
    """Writes the rows that were made, and keeps them; says how many places had none."""
    num_new = 0
    for m in range(len(missing_M)):
        n = missing_M[m]
        rows_NW[n] = made_MW[m]
        if number_N[n] >= 0:
            place = number_N[n] % len(kept_SR)
            num_new += kept_SR[place, 0] != since
            kept_SR[place, 0], kept_SR[place, 1] = since, tag_N[n]
            for b in range(len(columns_B)):
                kept_SR[place, 2 + b] = bits_NF[n, columns_B[b]]
            kept_as_floats_SR[place, 2 + len(columns_B) :] = made_MW[m]
    return num_new
