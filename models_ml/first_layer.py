"""The first layer of a ranker, from its parts.

What notes and authors add by themselves is kept from request to request (`RowMemo`). What the reader has of an author, most
often nothing, is made once for all candidates of whom it is the same, and added with the reader's own half. The rest is of the
moment.

N candidates of all requests, F features of each, M different ones of the reader's, W outputs.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from models_ml.features import FeatureInputs
from models_ml.request_inputs import FeatureShare, columns_by_owner, part_of
from models_ml.row_memo import NUM_BYTES, RowMemo
from models_ml.scoring import Notes, together
from warehouse.compiled import compiled, only_read

_NUMBERS, _BITS = only_read(types.int64, 1), only_read(types.int32, 2)

AddOfNotes = Callable[[np.ndarray, np.ndarray], None]


class FirstLayer:
    """Safe for threads.

    share: gives what a part of `inputs` adds, from (the part, int64: the places of its inputs among all, its columns among the
    values it will be given). of_note: adds to rows [M, W] what hangs from the notes' codes, int64 [M], alone.
    """

    def __init__(
        self,
        inputs: FeatureInputs,
        width: int,
        share: Callable[[FeatureInputs, Tensor, list[int]], FeatureShare],
        of_note: AddOfNotes | None = None,
        num_bytes: int = NUM_BYTES,
    ):
        of_reader, of_request, of_notes = columns_by_owner(inputs.names)
        self._note_names = tuple(inputs.names[column] for column in of_notes)
        self._other_names = tuple(inputs.names[column] for column in (*of_reader, *of_request))
        self._reader_columns_B, self._has_request = np.arange(len(of_reader)), bool(of_request)
        self._of_notes = share(*part_of(inputs, of_notes), list(range(len(of_notes))))
        self._of_reader = share(*part_of(inputs, of_reader), list(range(len(of_reader))))
        self._of_request = share(*part_of(inputs, of_request), list(range(len(of_reader), len(self._other_names))))
        self._width, self._of_note = width, of_note
        self.memo = RowMemo(len(of_notes), width, self._made, num_bytes)

    def fill(
        self,
        out_NW: np.ndarray,
        notes: Sequence[Notes],
        number_N: np.ndarray,
        code_N: np.ndarray,
        of_user_RW: np.ndarray,
    ) -> None:
        """Writes float32 [N, W]: what the candidates add, and what their readers do, of_user_RW.

        notes: of each request; number_N, code_N: int64, as `RowMemo.fill` takes them as numbers and tags.
        """
        start = 0
        for of_request in notes:
            span = slice(start, start + len(of_request))
            stamp_C, start = of_request.stamps(self._note_names), span.stop
            features = partial(_picked_at, of_request, self._note_names)
            self.memo.fill(out_NW[span], number_N[span], code_N[span], stamp_C, features)
        values_NF = together([of_request.pick(self._other_names) for of_request in notes])
        reader_of_N = np.repeat(np.arange(len(notes)), [len(of_request) for of_request in notes])
        place_N, first_M = distinct(values_NF, self._reader_columns_B, reader_of_N)
        different_MW = of_user_RW[reader_of_N[first_M]]
        self._of_reader.add_to(different_MW, values_NF[first_M])
        _add_rows(different_MW, place_N, out_NW)
        if self._has_request:
            self._of_request.add_to(out_NW, values_NF)

    def remade(self, notes: Notes, number_M: np.ndarray, code_M: np.ndarray) -> Callable[[], None]:
        """Makes anew what is kept of these notes; it is kept once what is returned is called. number_M, code_M: as of
        `fill`."""
        return self.memo.remade(number_M, code_M, notes.stamps(self._note_names), partial(_picked_at, notes, self._note_names))

    def _made(self, values_MF: np.ndarray, code_M: np.ndarray) -> np.ndarray:
        rows_MW = torch.zeros(len(values_MF), self._width).numpy()  # whose memory starts at a cache line, unlike NumPy's
        self._of_notes.add_to(rows_MW, values_MF)
        if self._of_note is not None:
            self._of_note(rows_MW, code_M)
        return rows_MW


def _picked_at(notes: Notes, names: tuple[str, ...], places_M: np.ndarray) -> np.ndarray:
    return notes.take(places_M).pick(names)


def distinct(values_NF: np.ndarray, columns_B: np.ndarray, group_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [N]: which of the M different rows each is, int64 [M]: where each of those comes first), in order of coming.

    Rows are the same where the group, int64, and the columns are, bit for bit. values_NF: float32, contiguous.
    """
    place_N, first_N = np.empty(len(values_NF), dtype=np.int64), np.empty(len(values_NF), dtype=np.int64)
    num_different = _distinct(values_NF.view(np.int32), columns_B, group_N, place_N, first_N)
    return place_N, first_N[:num_different]


@njit
def _are_same(bits_NF: np.ndarray, columns_B: np.ndarray, group_N: np.ndarray, one: int, other: int) -> bool:
    is_same = group_N[one] == group_N[other]
    for b in range(len(columns_B)):
        is_same = is_same and bits_NF[one, columns_B[b]] == bits_NF[other, columns_B[b]]
    return is_same


@compiled(types.int64(_BITS, _NUMBERS, _NUMBERS, types.int64[::1], types.int64[::1]))
def _distinct(bits_NF: np.ndarray, columns_B: np.ndarray, group_N: np.ndarray, place_N: np.ndarray, first_N: np.ndarray) -> int:
    num_slots = 2
    while num_slots < 2 * len(bits_NF):
        num_slots *= 2
    slots = np.full(num_slots, -1, dtype=np.int32)
    num_different = 0
    for n in range(len(bits_NF)):
        if n > 0 and _are_same(bits_NF, columns_B, group_N, n, n - 1):
            place_N[n] = place_N[n - 1]
            continue
        mixed = group_N[n]
        for b in range(len(columns_B)):
            mixed = (mixed ^ np.int64(bits_NF[n, columns_B[b]])) * np.int64(1_099_511_628_211)
            mixed ^= mixed >> np.int64(29)
        slot = mixed & np.int64(num_slots - 1)
        while slots[slot] >= 0 and not _are_same(bits_NF, columns_B, group_N, n, first_N[slots[slot]]):
            slot = (slot + 1) & (num_slots - 1)
        if slots[slot] < 0:
            slots[slot] = num_different
            first_N[num_different] = n
            num_different += 1
        place_N[n] = slots[slot]
    return num_different


@compiled(types.void(only_read(types.float32, 2), _NUMBERS, types.float32[:, ::1]))
def _add_rows(rows_MW: np.ndarray, place_N: np.ndarray, out_NW: np.ndarray) -> None:
    """out_NW += rows_MW[place_N]."""
    for n in range(len(place_N)):
        row_W, out_W = rows_MW[place_N[n]], out_NW[n]
        for w in range(len(out_W)):
            out_W[w] += row_W[w]
