"""What many reads at once know of events one by one, on NumPy arrays: those no block holds yet, the newest, the oldest.

As `compute_arrays`, which it builds on, it knows nothing of files, lakes or declarations. Times are int64 microseconds.

Shape letters: R rows, N reads, X pairs of a read and a row.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from warehouse.features import compute_arrays
from warehouse.features.compute_arrays import Instants, Places, pairs


class HeadArrays:
    """Events that a request at t knows and no block of its tick T holds, for K = "landed before t".

    Those are the events that landed in [T + grace, t), whatever their event_ts, and the events of [T, t) that landed before
    T + grace. codes, event_us, landed_us: int64 [R].
    """

    def __init__(self, codes: np.ndarray, event_us: np.ndarray, landed_us: np.ndarray, grace_us: int):
        self._grace_us = grace_us
        self._event, self._landed = event_us, landed_us
        num_codes = int(codes.max(initial=0)) + 1
        self._events, self._landings = Instants(event_us, num_codes), Instants(landed_us, num_codes)
        self._by_event = Places(codes, self._events.numbers(event_us), self._events.shift)
        self._by_landed = Places(codes, self._landings.numbers(landed_us), self._landings.shift)

    def pairs(self, codes: np.ndarray, request_us: np.ndarray, tick_us: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(read [X], event row [X]), sorted by read within each answer; every pair once."""
        closed_us = tick_us + self._grace_us
        places, instants = self._by_landed, self._landings
        starts = places.before(codes, instants.numbers(closed_us))
        ends = places.before(codes, instants.numbers(request_us))
        for read_X, place_X in pairs(starts, ends):
            row_X = places.order[place_X]
            known = self._event[row_X] < request_us[read_X]
            yield read_X[known], row_X[known]
        places, instants = self._by_event, self._events
        starts = places.before(codes, instants.numbers(tick_us))
        ends = places.before(codes, instants.numbers(request_us))
        for read_X, place_X in pairs(starts, ends):
            row_X = places.order[place_X]
            known = self._landed[row_X] < closed_us[read_X]
            yield read_X[known], row_X[known]


class EventOrder:
    """Rows of a key in the order of their times and, at one instant, of `ties`: which is the newest that a read knows.

    codes, event_us, known: int64 [R]. ties: columns [R] that decide in turn, ascending, NULL first, text bytewise. `known` is
    compared with what a read knows: a row counts when known < limit.
    """

    def __init__(self, codes: np.ndarray, event_us: np.ndarray, known: np.ndarray, ties: Sequence[pa.Array]):
        self._instants = Instants(event_us, int(codes.max(initial=0)) + 1)
        self._places = Places(codes, self._instants.numbers(event_us), self._instants.shift)
        self.order = self._places.order
        if len(at := self._places.ties()):
            tied = pa.array(self.order[at])
            columns = [self._places.place(at), *(column for tie in ties for column in _sortable(tie.take(tied)))]
            table = pa.table({str(number): column for number, column in enumerate(columns)})
            by = pc.sort_indices(table, [(name, "ascending") for name in table.column_names])
            self.order[at] = tied.take(by).to_numpy()
        self._known = known[self.order]

    def newest(self, codes: np.ndarray, upper_us: np.ndarray, limit: np.ndarray) -> np.ndarray:
        """int64 [N]: the row, as given, of each read's last one with event < upper and known < limit; -1 for none."""
        upper = self._instants.numbers(upper_us)
        by = np.argsort(np.maximum(codes, 0) << self._instants.shift | upper)  # neighbours are neighbours in memory
        codes, limit = codes[by], limit[by]
        starts, ends = self._places.before(codes, np.zeros_like(by)), self._places.before(codes, upper[by])
        found = np.full(len(by), -1)
        open_N = np.flatnonzero(ends > starts)
        last = ends[open_N] - 1
        known = self._known[last] < limit[open_N]
        found[open_N[known]] = last[known]
        open_N = open_N[~known]
        if len(open_N):
            count, row = self._nearest(1, starts[open_N], ends[open_N], limit[open_N], from_oldest=False)
            found[open_N[count > 0]] = row
        at = np.flatnonzero(found >= 0)
        answer = np.full(len(by), -1)
        answer[by[at]] = self.order[found[at]]
        return answer

    def nearest(
        self,
        n: int,
        codes: np.ndarray,
        lower_us: np.ndarray,
        upper_us: np.ndarray,
        limit: np.ndarray,
        from_oldest: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many rows each read gets, at most n of those with lower <= event < upper and known < limit, the newest or,
        from_oldest, the oldest; and their places in the order, oldest first."""
        starts, ends = self._ranges(codes, lower_us, upper_us)
        counts, rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        at_once = max(compute_arrays.PAIRS_AT_ONCE // (4 * n), 1)
        for first in range(0, len(codes), at_once):
            some = slice(first, first + at_once)
            count, row = self._nearest(n, starts[some], ends[some], limit[some], from_oldest)
            counts.append(count)
            rows.append(row)
        return np.concatenate(counts), np.concatenate(rows)

    def _ranges(self, codes: np.ndarray, lower_us: np.ndarray, upper_us: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each read's rows start and end in the order."""
        starts = self._places.before(codes, self._instants.numbers(lower_us))
        return starts, self._places.before(codes, self._instants.numbers(upper_us))

    def _nearest(
        self, n: int, starts: np.ndarray, ends: np.ndarray, limit: np.ndarray, from_oldest: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many events each read gets, and their rows, oldest first. Looks further while unknown ones took the room."""
        wanted = n
        while True:
            steps = np.arange(wanted)
            row_NX = starts[:, None] + steps if from_oldest else ends[:, None] - 1 - steps
            is_there = (row_NX >= starts[:, None]) & (row_NX < ends[:, None])
            if len(self._known):
                is_there &= self._known[np.clip(row_NX, 0, len(self._known) - 1)] < limit[:, None]
            is_there &= np.cumsum(is_there, axis=1) <= n
            count = is_there.sum(axis=1)
            if not ((count < n) & (ends - starts > wanted)).any():
                in_order = slice(None) if from_oldest else slice(None, None, -1)
                return count, row_NX[:, in_order][is_there[:, in_order]]
            wanted *= 2
            if len(starts) > 1 and len(starts) * wanted > compute_arrays.PAIRS_AT_ONCE:
                half = len(starts) // 2
                first = self._nearest(n, starts[:half], ends[:half], limit[:half], from_oldest)
                second = self._nearest(n, starts[half:], ends[half:], limit[half:], from_oldest)
                return np.concatenate((first[0], second[0])), np.concatenate((first[1], second[1]))


class EventArrays:
    """The newest, or the oldest, n events of a window that were known in time: what first_n and last_n read.

    codes, event_us, known: int64 [R]; ids: string [R]; values: one per event, of any type. Among events of one instant the
    order is that of their ids, bytewise.
    """

    def __init__(self, codes: np.ndarray, event_us: np.ndarray, known: np.ndarray, ids: pa.Array, values: pa.Array):
        self._order = EventOrder(codes, event_us, known, (ids, values))
        self._values = values.take(pa.array(self._order.order))

    def lists(
        self,
        n: int,
        codes: np.ndarray,
        lower_us: np.ndarray,
        upper_us: np.ndarray,
        limit: np.ndarray,
        from_oldest: bool = False,
    ) -> pa.ListArray:
        """Lists [N], oldest first, of at most n values each: of events with lower <= event_ts < upper and known < limit, the
        newest or, from_oldest, the oldest."""
        counts, chosen = self._order.nearest(n, codes, lower_us, upper_us, limit, from_oldest)
        offsets = np.concatenate(([0], np.cumsum(counts)))
        if offsets[-1] > np.iinfo(np.int32).max:
            raise OverflowError(
                f"{offsets[-1]} list entries in one chunk of reads; an Arrow list holds {np.iinfo(np.int32).max}"
            )
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), self._values.take(pa.array(chosen)))


def _sortable(column: pa.Array) -> tuple[pa.Array, ...]:
    """Columns whose ascending order, NULL first, is that of SQL: NaN is the largest number, false is less than true."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    is_there = pc.is_valid(column).cast(pa.int8())
    if pa.types.is_floating(column.type):
        is_nan = pc.is_nan(column)
        return is_there, is_nan.cast(pa.int8()), pc.if_else(is_nan, pa.scalar(0.0, column.type), column)
    return is_there, column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
