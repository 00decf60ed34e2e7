"""The measures of one family, read for many keys at one instant: blocks of every layer and events of the head, put together.

Shape letters: N keys asked for, M sum columns of the family, W window lengths of its sums.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import types

from streaming_sql import moments
from streaming_sql.block_layer import BlockLayer
from streaming_sql.entry_maps import Found
from streaming_sql.event_lists import Entry, chosen, number_of
from streaming_sql.head import HeadEvent
from streaming_sql.plan import Family, GroupPlan, cover_of
from streaming_sql.ragged import Instants
from streaming_sql.sessions import session_starts
from warehouse.compiled import compiled, only_read
from warehouse.features.measures import Measure
from warehouse.time_algebra import Window, floor_5m


@dataclass(frozen=True)
class Instant:
    """What a read is made at: the tick T, the log position K, and the request's t; microseconds."""

    tick_us: int
    position: tuple[int, ...]
    t_us: int

    def anchor(self, family: str) -> int:
        return self.tick_us if family == "tick" else floor_5m(self.t_us)

    def upper(self, family: str) -> int:
        """Where the family's windows end, head included."""
        return self.t_us if family == "event" else self.tick_us


class WindowReader:
    """One family of one read."""

    def __init__(
        self,
        plan: GroupPlan,
        family: Family,
        layers: tuple[BlockLayer, ...],
        rows: np.ndarray,
        heads: list[list[HeadEvent]],
        at: Instant,
    ):
        """rows: int64 [N], -1 for keys never seen; heads: the visible events of each key, none unless the family is fresh."""
        self._plan, self._family, self._layers, self._rows, self._at = plan, family, layers, rows, at
        self._anchor = at.anchor(family.name)
        self._heads = [(n, event) for n, events in enumerate(heads) for event in events]
        self._runs = [layer.runs_of(rows) for layer in layers]
        self.num_keys = len(rows)
        self._sums = self._all_sums()

    def _all_sums(self) -> np.ndarray:
        """int64 [N, M, W]: of blocks and head."""
        family = self._family
        out = np.zeros((self.num_keys, len(family.sum_columns), len(family.lengths_us)), dtype=np.int64)
        if out.size == 0:
            return out
        lower = [min(self._anchor - length, self._at.tick_us) for length in family.lengths_us]
        self._add_sums(np.array([lower], dtype=np.int64), out)
        for n, event in self._heads:
            in_windows = out[n, :, bisect_left(family.lengths_us, self._anchor - event.event_ts) :]
            in_windows += np.array(self._summands(event), dtype=np.int64)[:, None]
        return out

    def _summands(self, event: HeadEvent) -> list[int]:
        """What an event of the head adds to each sum column, [M]."""
        summands: list[int] = []
        for place, measure in enumerate(self._plan.fresh):
            if measure.is_invertible:
                value = event.values[place]
                first = 0 if value is None else 1 if measure.aggregation == "count" else value
                summands += [first, *[int(value is not None)] * (len(measure.columns) - 1)]
        return summands

    def _add_sums(self, lower: np.ndarray, out: np.ndarray) -> None:
        """lower: int64 [N, W], or [1, W] for all."""
        for layer, run in zip(self._layers, self._runs, strict=True):
            layer.add_sums(self._family.name, run, lower, self._at.tick_us, out)

    def write_sums(self, matrix: np.ndarray) -> None:
        """The features that are sums, or averages of them, into their columns of the group's [N, F]."""
        reads = self._plan.reads[self._family.name]
        _write_sums(self._sums, reads.sums, reads.averages, reads.empty, matrix)

    def numbers(self, measure: Measure, window: Window) -> list[np.ndarray]:
        """The representation's columns of a number or extreme, [N] each: int64 for sums, else float64."""
        lower, head_lower = self._lower(measure, window)
        if not measure.is_invertible:
            parts = [self._covered(measure, column, lower) for column in measure.columns]
        else:
            assert isinstance(lower, np.ndarray)  # of sessions: other sums are written at once
            sums = np.zeros((self.num_keys, len(self._family.sum_columns), 1), dtype=np.int64)
            self._add_sums(lower[:, None], sums)
            parts = [sums[:, self._family.sum_columns.index(column), 0].copy() for column in measure.columns]
        combine = cover_of(measure).combine
        for n, _, value in self._head(measure, head_lower):
            parts[0][n] = parts[0][n] + 1 if measure.aggregation == "count" else combine(parts[0][n], value)
            for count in parts[1:]:
                count[n] += 1
        return parts

    def _covered(self, measure: Measure, column: str, lower: Instants) -> np.ndarray:
        cover = cover_of(measure)
        out = np.full(self.num_keys, cover.identity)
        for layer, run in zip(self._layers, self._runs, strict=True):
            layer.cover(column, cover, run, lower, self._at.tick_us, out)
        return out

    def moments(self, measure: Measure, window: Window) -> np.ndarray:
        """float64 [N, 3]: (n, mean, M2)."""
        lower, head_lower = self._lower(measure, window)
        out = np.zeros((self.num_keys, 3))
        for layer, run in zip(self._layers, self._runs, strict=True):
            out = moments.merged(out, layer.moments_of(measure, run, lower, self._at.tick_us))
        of_head = [(n, value) for n, _, value in self._head(measure, head_lower)]  # ascending in n
        if of_head:
            single = np.array([(1.0, value, 0.0) for _, value in of_head])
            owners, first = np.unique([n for n, _ in of_head], return_index=True)
            out[owners] = moments.merged(out[owners], moments.merged_by(single, first))
        return out

    def lists(self, measure: Measure, window: Window) -> list[list[str]]:
        """The values that the measure keeps, oldest first."""
        lower, head_lower = self._lower(measure, window)
        entries: list[list[Entry]] = [[] for _ in range(self.num_keys)]
        for layer in self._layers:
            owner, *columns = layer.lists[measure.name].found(measure, self._rows, lower, self._at.tick_us)
            for n, entry in zip(owner.tolist(), zip(*columns, strict=True), strict=True):
                entries[n].append(entry)
        for n, event, value in self._head(measure, head_lower):
            entries[n].append((event.event_ts, event.event_id, value))
        return [chosen(measure, found) for found in entries]

    def first_or_last(self, measure: Measure, window: Window) -> np.ndarray:
        """float64 [N], NaN where there is none."""
        return np.array([number_of(measure, values) for values in self.lists(measure, window)])

    def maps(self, measure: Measure, window: Window) -> Found:
        """The entries of each key, by (owner, entry)."""
        lower, head_lower = self._lower(measure, window)
        shape = self._plan.maps[measure.name]
        parts = [layer.maps[measure.name].found(self._rows, lower, self._at.tick_us) for layer in self._layers]
        of_head = [(n, value) for n, _, value in self._head(measure, head_lower)]
        return Found.grouped(shape, [*parts, Found.of_pairs(shape, of_head)] if of_head else parts)

    def _head(self, measure: Measure, lower: Instants) -> list[tuple[int, HeadEvent, Any]]:
        """(n, event, value) of the head's events in the measure's set and window, ascending in n."""
        if not self._heads:
            return []
        place = self._plan.fresh.index(measure)
        lowers = lower.tolist() if isinstance(lower, np.ndarray) else [lower] * self.num_keys
        return [
            (n, event, event.values[place])
            for n, event in self._heads
            if event.values[place] is not None and event.event_ts >= lowers[n]
        ]

    def _lower(self, measure: Measure, window: Window) -> tuple[Instants, Instants]:
        """Where the window begins, in blocks and in the head."""
        head_lower = self._anchor - window.length_us
        lower = min(head_lower, self._at.tick_us)  # blocks end at the tick, the head goes on from there
        if window.session_gap_us is None:
            return lower, head_lower
        parts = [layer.held_blocks(self._plan, measure, self._rows, lower, self._at.tick_us) for layer in self._layers]
        of_head = self._head(measure, head_lower)
        owners = np.array([n for n, _, _ in of_head], dtype=np.int64)
        parts.append((owners, np.array([floor_5m(event.event_ts) for _, event, _ in of_head], dtype=np.int64)))
        owner, block_us = (np.concatenate(column) for column in zip(*parts, strict=True))
        upper = self._at.upper(self._family.name)
        starts = session_starts(owner, block_us, self.num_keys, upper, window.session_gap_us)
        return starts, starts


_PLACES = only_read(types.int64, 2)


@compiled(types.void(only_read(types.int64, 3), _PLACES, _PLACES, only_read(types.float64), types.float64[:, ::1]))
def _write_sums(sums_NMW: np.ndarray, sums: np.ndarray, averages: np.ndarray, empty: np.ndarray, matrix_NF: np.ndarray) -> None:
    """sums, averages and empty: of `Reads`."""
    for n in range(len(sums_NMW)):
        for s in range(len(sums)):
            matrix_NF[n, sums[s, 2]] = sums_NMW[n, sums[s, 0], sums[s, 1]]
        for a in range(len(averages)):
            count = sums_NMW[n, averages[a, 1], averages[a, 2]]
            average = empty[a]
            if count > 0:
                average = sums_NMW[n, averages[a, 0], averages[a, 2]] / count
            matrix_NF[n, averages[a, 3]] = average
