"""Rows of a layer's outputs, kept from request to request for as long as what they are made of stays the same.

Between two ticks a note's block features never change: the same rows of features come again and again. Nothing here knows of
ticks: a row has its place by its number. It is used where its stamp says that nothing changed, which needs no look at the
features; and where the features that it was made of are the same bit for bit, whatever the stamp.
N rows asked for, M of them whose stamp is another, K not kept with it, S places, B features that a row is made of, W outputs.
"""

import contextlib
import mmap
import threading
from collections.abc import Callable

import numpy as np
from numba import types

from warehouse.compiled import compiled, only_read

NUM_BYTES = 256 << 20
"""What a memo may take; places that were never used cost no memory. With 4 members of 96 units a row takes 1.7 KB."""

_PIECE = 1024
"""Rows that are made again at once: others wait no longer for the interpreter, or for the lock, than one piece takes."""
_HEAD = 3  # numbers of a place before its outputs
_NUMBERS, _BITS = only_read(types.int64, 1), only_read(types.int32, 2)
_ASKED, _TABLES = (_NUMBERS,) * 3, (types.int32[:, ::1],) * 2
"""Of the loops: number_N, tag_N, stamp_N; kept_SR, rows_NW. All numbers are bits: as bits NULL equals NULL."""


class RowMemo:
    """Safe for threads. make: (features float32 [M, B], tags int64 [M]) -> float32 [M, W], each row from its own alone.

    num_places: how many rows it can keep. num_hits, num_misses: rows found and made since the start.
    """

    def __init__(
        self,
        num_features: int,
        width: int,
        make: Callable[[np.ndarray, np.ndarray], np.ndarray],
        num_bytes: int = NUM_BYTES,
    ):
        self._make, self._lock = make, threading.Lock()
        num_numbers = _HEAD + num_features + width
        self.num_places = max(1, num_bytes // (4 * num_numbers))
        # of a place: since when its row is kept (0: none is), the row's tag and stamp, its outputs' bits, its features' bits:
        # side by side, so that memory is asked once
        self._kept_SR = _small_pages(self.num_places * num_numbers).reshape(self.num_places, num_numbers)
        self._since = 1
        self._num_kept = self.num_hits = self.num_misses = 0

    def __len__(self) -> int:
        """The rows that are kept."""
        return self._num_kept

    @property
    def num_bytes(self) -> int:
        """Of the places, those never used as well."""
        return self._kept_SR.nbytes

    def fill(
        self,
        rows_NW: np.ndarray,
        number_N: np.ndarray,
        tag_N: np.ndarray,
        stamp_N: np.ndarray,
        features: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        """Writes the row of each, float32 and contiguous.

        number_N: int64, whose row it is; rows of one number, or of two that are a multiple of the places apart, take turns. One
        below 0 is made each time. tag_N: int64, what else a row is made of, not below 0; two numbers that may take turns have
        different ones. stamp_N: int64, above 0 where the features are those of every row of this number with this stamp.
        features: those at some places of the N, float32 [M, B], contiguous.
        """
        asked, tables = (number_N, tag_N, stamp_N), (self._kept_SR, rows_NW.view(np.int32))
        other_N = np.empty(len(rows_NW), dtype=np.int64)
        with self._lock:
            since = self._since
            num_others = _find_by_stamp(since, *asked, *tables, other_N)
            self.num_hits += len(rows_NW) - num_others
        if not num_others:
            return
        other_M = other_N[:num_others]
        features_MB = features(other_M)
        bits_MB = features_MB.view(np.int32)
        missing_M = np.empty(num_others, dtype=np.int64)
        with self._lock:
            num_missing = _find_by_bits(since, *asked, *tables, other_M, bits_MB, missing_M)
            self.num_hits += num_others - num_missing
            self.num_misses += num_missing
        if not num_missing:
            return
        missing = missing_M[:num_missing]
        missing_of_N = other_M[missing]
        made_MW = self._make(features_MB[missing], tag_N[missing_of_N])
        with self._lock:
            num_new = _keep(since, *asked, *tables, missing_of_N, bits_MB[missing], made_MW.view(np.int32))
            if since == self._since:
                self._num_kept += num_new

    def kept(self, tag_R: np.ndarray) -> np.ndarray:
        """int64: which of the numbers below R are kept under these tags, int64 [R]."""
        held_RH = self._kept_SR[: len(tag_R), :_HEAD]
        return np.flatnonzero((held_RH[:, 0] == self._since) & (held_RH[:, 1] == tag_R[: len(held_RH)]))

    def remade(
        self, number_M: np.ndarray, tag_M: np.ndarray, stamp_M: np.ndarray, features: Callable[[np.ndarray], np.ndarray]
    ) -> Callable[[], None]:
        """Makes the rows that are not kept with their stamp, and keeps them once what it returns is called. Arguments as of
        `fill`, of numbers that are not below 0."""
        since, made = self._since, []
        held_MH = self._kept_SR[number_M % self.num_places, :_HEAD]
        places_K = np.flatnonzero((held_MH[:, 0] != since) | (held_MH[:, 1] != tag_M) | (held_MH[:, 2] != stamp_M))
        for start in range(0, len(places_K), _PIECE):
            places = places_K[start : start + _PIECE]
            features_PB = features(places)
            made.append((places, features_PB, self._make(features_PB, tag_M[places])))

        def keep() -> None:
            for places, features_PB, made_PW in made:
                asked, bits = (number_M[places], tag_M[places], stamp_M[places]), made_PW.view(np.int32)
                with self._lock:
                    num_new = _keep(
                        since, *asked, self._kept_SR, bits, np.arange(len(places)), features_PB.view(np.int32), bits
                    )
                    if since == self._since:
                        self._num_kept += num_new

        return keep

    def forget(self) -> None:
        """Empties all places."""
        with self._lock:
            self._since += 1
            self._num_kept = 0


def _small_pages(size: int) -> np.ndarray:
    """int32 [size] of zeros. NumPy asks for huge pages, of which the first few hundred rows would touch, and so fill, nearly
    all: most of a second in the first request."""
    memory = mmap.mmap(-1, 4 * size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=np.int32)


@compiled(types.int64(types.int64, *_ASKED, *_TABLES, types.int64[::1]))
def _find_by_stamp(
    since: int,
    number_N: np.ndarray,
    tag_N: np.ndarray,
    stamp_N: np.ndarray,
    kept_SR: np.ndarray,
    rows_NW: np.ndarray,
    other_N: np.ndarray,
) -> int:
    """Writes the rows whose stamp is kept; the others' places into other_N, and says how many."""
    num_others, width = 0, rows_NW.shape[1]
    for n in range(len(number_N)):
        kept_R = kept_SR[number_N[n] % len(kept_SR)]
        if number_N[n] >= 0 and stamp_N[n] > 0 and kept_R[0] == since and kept_R[1] == tag_N[n] and kept_R[2] == stamp_N[n]:
            for w in range(width):
                rows_NW[n, w] = kept_R[_HEAD + w]
        else:
            other_N[num_others] = n
            num_others += 1
    return num_others


@compiled(types.int64(types.int64, *_ASKED, *_TABLES, _NUMBERS, _BITS, types.int64[::1]))
def _find_by_bits(
    since: int,
    number_N: np.ndarray,
    tag_N: np.ndarray,
    stamp_N: np.ndarray,
    kept_SR: np.ndarray,
    rows_NW: np.ndarray,
    other_M: np.ndarray,
    bits_MB: np.ndarray,
    missing_M: np.ndarray,
) -> int:
    """Writes the rows whose features are kept, and keeps their stamps; the others among the M into missing_M, and how many."""
    num_missing, num_features, width = 0, bits_MB.shape[1], rows_NW.shape[1]
    for m in range(len(other_M)):
        n = other_M[m]
        kept_R = kept_SR[number_N[n] % len(kept_SR)]
        is_same = number_N[n] >= 0 and kept_R[0] == since and kept_R[1] == tag_N[n]
        for b in range(num_features):
            if not is_same:
                break
            is_same = bits_MB[m, b] == kept_R[_HEAD + width + b]
        if is_same:
            kept_R[2] = stamp_N[n]
            for w in range(width):
                rows_NW[n, w] = kept_R[_HEAD + w]
        else:
            missing_M[num_missing] = m
            num_missing += 1
    return num_missing


@compiled(types.int64(types.int64, *_ASKED, *_TABLES, _NUMBERS, _BITS, _BITS))
def _keep(
    since: int,
    number_N: np.ndarray,
    tag_N: np.ndarray,
    stamp_N: np.ndarray,
    kept_SR: np.ndarray,
    rows_NW: np.ndarray,
    missing_M: np.ndarray,
    bits_MB: np.ndarray,
    made_MW: np.ndarray,
) -> int:
    """Writes the rows that were made, and keeps them; says how many places had none. missing_M: places among the N."""
    num_new, num_features, width = 0, bits_MB.shape[1], rows_NW.shape[1]
    for m in range(len(missing_M)):
        n = missing_M[m]
        for w in range(width):
            rows_NW[n, w] = made_MW[m, w]
        if number_N[n] >= 0:
            kept_R = kept_SR[number_N[n] % len(kept_SR)]
            num_new += kept_R[0] != since
            kept_R[0], kept_R[1], kept_R[2] = since, tag_N[n], stamp_N[n]
            for w in range(width):
                kept_R[_HEAD + w] = made_MW[m, w]
            for b in range(num_features):
                kept_R[_HEAD + width + b] = bits_MB[m, b]
    return num_new
