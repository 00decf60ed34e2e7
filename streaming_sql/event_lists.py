"""Lists of events (first, last, first_n, last_n, last_distinct_n): stored per block by (row, event_ts, event_id).

Shape letters: R stored entries, E entries found, N keys asked for.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from streaming_sql.ragged import Instants, laid_out, opens, places, stretches
from warehouse.features.measures import Measure

ENTRY_SCHEMA = pa.schema([("row", pa.int64()), ("event_ts", pa.int64()), ("event_id", pa.string()), ("value", pa.string())])
Entry = tuple[int, str, str]
"""(event_ts in microseconds, event_id, value): the total order of events."""


@dataclass(frozen=True)
class EventLists:
    """The lists of one measure, laid end to end, at most n per block."""

    place: np.ndarray
    row: np.ndarray
    event_ts: np.ndarray
    event_id: pa.Array
    value: pa.Array

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.place, self.row, self.event_ts, self.event_id, self.value))

    @classmethod
    def of(cls, table: pa.Table, measure: Measure) -> "EventLists":
        """table: ENTRY_SCHEMA. What the measure keeps of each block stays. Not of each row: retracting one of
        them brings back the one before."""
        ordered = table.take(pc.sort_indices(table, [(name, "ascending") for name in ("row", "event_ts", "event_id")]))
        place = places(ordered["row"].to_numpy(), ordered["event_ts"].to_numpy())
        keep = np.ones(len(place), dtype=bool)
        if measure.aggregation == "last_distinct_n":
            keep = _is_last_of_its_value(place, ordered["value"])
        at = np.flatnonzero(keep)
        if is_oldest_first(measure):
            rank = np.arange(len(at)) - np.searchsorted(place[at], place[at])
        else:
            rank = np.searchsorted(place[at], place[at], side="right") - 1 - np.arange(len(at))
        at = at[rank < size_of(measure)]
        ordered = ordered.take(pa.array(at)).combine_chunks()
        row, event_ts, event_id, value = (one_array(column) for column in ordered.columns)
        return cls(place[at], row.to_numpy(), event_ts.to_numpy(), event_id, value)

    def table(self) -> pa.Table:
        return pa.table([self.row, self.event_ts, self.event_id, self.value], schema=ENTRY_SCHEMA)

    def without(self, emptied: np.ndarray) -> "EventLists":
        """Less the entries of some blocks. emptied: int64, their places."""
        gone = np.isin(self.place, emptied)
        if not gone.any():
            return self
        kept = pa.array(~gone)
        return EventLists(
            self.place[~gone], self.row[~gone], self.event_ts[~gone], self.event_id.filter(kept), self.value.filter(kept)
        )

    def found(
        self, measure: Measure, row: np.ndarray, lower_us: Instants, upper_us: int
    ) -> tuple[np.ndarray, list[int], list[str], list[str]]:
        """(owner, event_ts, event_id, value) of entries in the blocks of [lower_us, upper_us), among them all that the measure
        keeps of these."""
        low, high = stretches(self.place, row, lower_us, upper_us)
        (some,) = (high > low).nonzero()
        if not len(some):
            return some, [], [], []
        if is_oldest_first(measure):
            high = np.minimum(high, low + size_of(measure))
        elif measure.aggregation != "last_distinct_n":
            low = np.maximum(low, high - size_of(measure))
        else:
            low = self._lows_of_distinct(low, high, size_of(measure))
        if len(some) > 1:
            index, owner = laid_out(low, high)
            taken = pa.array(index)
            ids, values = self.event_id.take(taken), self.value.take(taken)
            return owner, self.event_ts[index].tolist(), ids.to_pylist(), values.to_pylist()
        begin, end = (int(edge[some[0]]) for edge in (low, high))
        owner = some.repeat(end - begin)
        columns = (self.event_ts[begin:end], self.event_id[begin:end], self.value[begin:end])
        return owner, *(column.tolist() for column in columns)

    def _lows_of_distinct(self, low: np.ndarray, high: np.ndarray, n: int) -> np.ndarray:
        """From where on each stretch holds its newest n distinct values."""
        narrowed = low.copy()
        for at in np.flatnonzero(high - low > n).tolist():
            size = 2 * n
            while size < high[at] - low[at]:
                if len(self.value.slice(high[at] - size, size).unique()) >= n:
                    narrowed[at] = high[at] - size
                    break
                size *= 2
        return narrowed


def is_oldest_first(measure: Measure) -> bool:
    """Whether the oldest are kept, not the newest."""
    return measure.aggregation in ("first", "first_n")


def chosen(measure: Measure, entries: Iterable[Entry]) -> list[str]:
    """The values that the measure keeps of entries in any order, oldest first."""
    ordered, n = sorted(entries), size_of(measure)
    if is_oldest_first(measure):
        return [value for _, _, value in ordered[:n]]
    if measure.aggregation == "last_distinct_n":
        return list(dict.fromkeys(value for _, _, value in reversed(ordered)))[:n][::-1]
    return [value for _, _, value in ordered[-n:]]


def number_of(measure: Measure, values: list[str]) -> float:
    """The one value of `first` or `last`, NaN of none."""
    return float(int(values[0]) if measure.type == "bigint" else float(values[0])) if values else float("nan")


def size_of(measure: Measure) -> int:
    assert measure.n is not None
    return measure.n


def flattened(row: np.ndarray, lists: pa.ChunkedArray) -> pa.Table:
    """ENTRY_SCHEMA of a block column of lists, `row` [R] being the row ids of the blocks."""
    array = one_array(lists)
    structs, owner = array.flatten(), pc.list_parent_indices(array).to_numpy()
    event_ts = pc.struct_field(structs, "event_ts").cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
    event_id, value = (pc.struct_field(structs, name).cast(pa.string()) for name in ("event_id", "value"))
    return pa.table([row[owner], event_ts, event_id, value], schema=ENTRY_SCHEMA)


def one_array(column: pa.ChunkedArray) -> Any:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _is_last_of_its_value(place: np.ndarray, value: pa.ChunkedArray) -> np.ndarray:
    """bool [R]: no later entry of the block has the value. place is ascending, and so is time within it."""
    is_last = np.zeros(len(place), dtype=bool)
    if len(place):
        code = pc.dictionary_encode(value).combine_chunks().indices.to_numpy()
        order = np.lexsort((np.arange(len(place)), code, place))
        is_last[order[np.append(opens(place[order], code[order])[1:], len(order)) - 1]] = True
    return is_last
