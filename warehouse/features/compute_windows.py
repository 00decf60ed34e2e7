"""The measures that arrays answer: windows over blocks and the head, and the first or last values among events."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from warehouse.features.compute_arrays import (
    BlockArrays,
    Extreme,
    KeyCodes,
    add_pairs,
    block_index,
)
from warehouse.features.compute_event_arrays import EventArrays, HeadArrays
from warehouse.features.compute_plan import type_of
from warehouse.features.compute_rows import BlockRows
from warehouse.features.compute_source import Source, as_type, condition_of, event_items, is_extreme
from warehouse.features.compute_spine import Reads
from warehouse.features.measures import Measure
from warehouse.time_algebra import FIVE_MINUTES_US, GRACE_US


@dataclass(frozen=True)
class _Edges:
    """Where windows lie in event time and what blocks they read: microseconds, int64 [N]."""

    anchor_us: np.ndarray
    upper_us: np.ndarray
    known_us: np.ndarray

    @classmethod
    def of(cls, measure: Measure, reads: Reads) -> "_Edges":
        request_tick_us = reads.request_us // FIVE_MINUTES_US * FIVE_MINUTES_US
        if measure.freshness == "event":
            return cls(request_tick_us, reads.tick_us, reads.tick_us)
        anchor_us = request_tick_us if measure.anchor == "request" else reads.tick_us
        return cls(anchor_us, np.minimum(reads.tick_us, reads.known_us), reads.known_us)

    def lower_us(self, length_us: int) -> np.ndarray:
        return np.minimum(self.anchor_us - length_us, self.upper_us)


def _family(measure: Measure) -> str:
    return "event" if measure.freshness == "event" else measure.anchor


class Windows:
    """Counts, exact sums, averages, minima and maxima over windows of blocks, and of the head where they are fresh."""

    def __init__(self, source: Source, measures: Sequence[Measure]):
        self._measures, self._keys = measures, source.group.keys
        self._sum_columns = [column for m in measures if not is_extreme(m) for column in m.columns]
        extremes = [measure for measure in measures if is_extreme(measure)]
        num_rows, batches = source.blocks([*self._sum_columns, *(measure.name for measure in extremes)])
        types = {measure.name: _dtype(measure) for measure in extremes}
        rows = BlockRows(num_rows, batches, self._keys, self._sum_columns, types)
        self._codes = KeyCodes(rows.take_keys())
        self._blocks = BlockArrays(
            self._codes.codes,
            rows.block,
            rows.known,
            (rows.take(column) for column in self._sum_columns),
            {m.name: (rows.take(m.name), rows.take_valid(m.name), m.aggregation == "max") for m in extremes},
        )
        fresh = [measure for measure in measures if measure.freshness == "event"]
        self._head = _Head(source, fresh) if fresh else None

    def columns(self, reads: Reads) -> dict[str, pa.Array]:
        codes = self._codes.look_up([reads.keys[key] for key in self._keys])
        found: dict[str, pa.Array] = {}
        for family in dict.fromkeys(map(_family, self._measures)):
            measures = [measure for measure in self._measures if _family(measure) == family]
            head = self._head.of(reads) if self._head is not None and family == "event" else None
            edges = _Edges.of(measures[0], reads)
            known, upper = block_index(edges.known_us), block_index(edges.upper_us)
            sums = [measure for measure in measures if not is_extreme(measure)]
            lengths = {window.length_us: window.name for measure in sums for window in measure.windows}
            lowers = {length: block_index(edges.lower_us(length)) for length in lengths}
            totals = self._blocks.sums(codes, known, upper, list(lowers.values()))
            for length_us, columns in zip(lengths, totals, strict=True):
                total = dict(zip(self._sum_columns, columns, strict=True))
                if head is not None:
                    head.add(total, edges.anchor_us - length_us)
                for measure in sums:
                    for window in measure.windows:
                        if window.length_us == length_us:
                            found[f"{measure.name}_{window.name}"] = _finalized(measure, total)
            for measure in measures:
                if not is_extreme(measure):
                    continue
                for window in measure.windows:
                    lower = block_index(edges.lower_us(window.length_us))
                    extreme = self._blocks.extreme(measure.name, codes, known, upper, lower)
                    if head is not None:
                        head.consider(extreme, measure, edges.anchor_us - window.length_us)
                    found[f"{measure.name}_{window.name}"] = _or_empty(measure, extreme.array())
        return found


def _finalized(measure: Measure, total: Mapping[str, np.ndarray]) -> pa.Array:
    first, *number = (total[column] for column in measure.columns)
    if not number:
        return pa.array(first)
    empty = number[0] == 0
    return _or_empty(measure, pa.array(first.astype(np.float64) / np.where(empty, 1, number[0]), mask=empty))


def _or_empty(measure: Measure, values: pa.Array) -> pa.Array:
    """The declared number where there is nothing."""
    if measure.empty is None:
        return values
    of = type_of(measure)
    return pc.fill_null(values.cast(of), pa.scalar(measure.empty).cast(of))


class _Head:
    """The events that fresh measures add to the blocks of tick T."""

    def __init__(self, source: Source, measures: Sequence[Measure]):
        self._keys = source.group.keys
        rows = source.events(
            [item for measure in measures for item in event_items(measure)],
            " or ".join(f"({condition_of(measure)})" for measure in measures),
            source.span.first_us,
        )
        self._codes = KeyCodes([rows[key] for key in self._keys])
        self._event_us = _numbers(rows, "event_us")
        self._sums = {column: _numbers(rows, column) for m in measures if not is_extreme(m) for column in m.columns}
        self._extremes = {measure.name: _values(rows, measure) for measure in measures if is_extreme(measure)}
        self._arrays = HeadArrays(self._codes.codes, self._event_us, _numbers(rows, "landed_us"), GRACE_US)

    def of(self, reads: Reads) -> "_HeadOfReads":
        codes = self._codes.look_up([reads.keys[key] for key in self._keys])
        found = list(self._arrays.pairs(codes, reads.request_us, reads.tick_us))
        return _HeadOfReads(found, self._event_us, self._sums, self._extremes)


@dataclass(frozen=True)
class _HeadOfReads:
    """Pairs of a read and an event of its head, and what the events weigh."""

    pairs: list[tuple[np.ndarray, np.ndarray]]
    event_us: np.ndarray
    sums: Mapping[str, np.ndarray]
    extremes: Mapping[str, tuple[np.ndarray, np.ndarray]]

    def add(self, total: Mapping[str, np.ndarray], lower_us: np.ndarray) -> None:
        """Adds the events at or after each read's lower edge; columns that are not fresh stay as they are."""
        for read_X, row_X in self.pairs:
            inside = self.event_us[row_X] >= lower_us[read_X]
            read, row = read_X[inside], row_X[inside]
            for column, value in self.sums.items():
                add_pairs(total[column], read, value[row])

    def consider(self, extreme: Extreme, measure: Measure, lower_us: np.ndarray) -> None:
        value, valid = self.extremes[measure.name]
        for read_X, row_X in self.pairs:
            inside = (self.event_us[row_X] >= lower_us[read_X]) & valid[row_X]
            extreme.take(read_X[inside], value[row_X[inside]])


class Events:
    """The first or last n values of a window: read from events, which are fewer than the lists that blocks hold of them."""

    def __init__(self, source: Source, measure: Measure):
        self._measure, self._keys = measure, source.group.keys
        self._is_list = measure.is_sequence
        of = "varchar" if self._is_list else measure.type
        rows = source.events(
            ["event_id", f"cast(({measure.of}) as {of}) as value"], condition_of(measure), source.first_event_us
        )
        known = _numbers(rows, "landed_us" if measure.freshness == "event" else "known_us")
        self._codes = KeyCodes([rows[key] for key in self._keys])
        ids = as_type(rows["event_id"], pa.string())
        values = as_type(rows["value"], pa.string() if self._is_list else rows.schema.field("value").type)
        self._arrays = EventArrays(self._codes.codes, _numbers(rows, "event_us"), known, ids, values)

    def columns(self, reads: Reads) -> dict[str, pa.Array]:
        measure = self._measure
        assert measure.n is not None
        codes = self._codes.look_up([reads.keys[key] for key in self._keys])
        edges = _Edges.of(measure, reads)
        is_fresh = measure.freshness == "event"
        upper_us = reads.request_us if is_fresh else edges.upper_us
        limit_us = reads.request_us if is_fresh else edges.known_us + 1
        of_window = {
            window.name: self._arrays.lists(
                measure.n,
                codes,
                np.minimum(edges.anchor_us - window.length_us, upper_us),
                upper_us,
                limit_us,
                from_oldest=measure.aggregation in ("first", "first_n"),
            )
            for window in measure.windows
        }
        if self._is_list:
            return {f"{measure.name}_{name}": lists for name, lists in of_window.items()}
        return {f"{measure.name}_{name}": _or_empty(measure, _only(lists)) for name, lists in of_window.items()}


def _only(lists: pa.ListArray) -> pa.Array:
    """The entry of lists of at most one, NULL of empty ones."""
    lengths = np.diff(lists.offsets.to_numpy())
    place = pa.array(lists.offsets.to_numpy()[:-1].astype(np.int64), mask=lengths == 0)
    return lists.values.take(place)


def _numbers(rows: pa.Table, column: str) -> np.ndarray:
    return rows[column].to_numpy().astype(np.int64, copy=False)


def _values(rows: pa.Table, measure: Measure) -> tuple[np.ndarray, np.ndarray]:
    """Values (0 where NULL) and which are not NULL."""
    column = rows[measure.name]
    return column.fill_null(0).to_numpy().astype(_dtype(measure), copy=False), column.is_valid().to_numpy()


def _dtype(measure: Measure) -> type[np.generic]:
    return np.float64 if measure.type == "double" else np.int64
