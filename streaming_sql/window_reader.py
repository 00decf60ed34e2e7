"""The measures of one family, read for many keys at one instant: blocks of every layer and events of the head, put together.

Shape letters: N keys asked for, M sum columns of the family, W window lengths of its sums.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from streaming_sql import moments
from streaming_sql.block_layer import BlockLayer
from streaming_sql.entry_maps import Found
from streaming_sql.event_lists import Entry, chosen, number_of
from streaming_sql.head import HeadEvent
from streaming_sql.plan import Family, GroupPlan, cover_of
from streaming_sql.ragged import Instants
from streaming_sql.sessions import session_starts
from warehouse.features.measures import Measure
from warehouse.time_algebra import Window, floor_5m


@dataclass(frozen=True)
class Instant:
    """What a read is made at: the tick T, the log position K, and the request's t; microseconds."""

    tick_us: int
    position: tuple[int, ...]
    t_us: int

    def bounds(self, family: str, length_us: int) -> tuple[int, int]:
        """[lower, upper) in event time over blocks; a fresh measure's head goes on from upper to t."""
        return min(self.anchor(family) - length_us, self.tick_us), self.tick_us

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
        self._heads = [(n, event) for n, events in enumerate(heads) for event in events]
        self._runs = [layer.runs_of(rows) for layer in layers]
        self.num_keys = len(rows)
        self._sums = self._all_sums()

    def _all_sums(self) -> np.ndarray:
        """int64 [N, M, W]."""
        family = self._family
        out = np.zeros((self.num_keys, len(family.sum_columns), len(family.lengths_us)), dtype=np.int64)
        if out.size == 0:
            return out
        bounds = [self._at.bounds(family.name, length) for length in family.lengths_us]
        return self._summed(np.tile(np.array([low for low, _ in bounds], dtype=np.int64), (self.num_keys, 1)), out)

    def _summed(self, lower: np.ndarray, out: np.ndarray) -> np.ndarray:
        upper = np.full(self.num_keys, self._at.tick_us, dtype=np.int64)
        for layer, run in zip(self._layers, self._runs, strict=True):
            out += layer.windowed_sums(self._family.name, run, lower, upper)
        return out

    @property
    def has_head(self) -> bool:
        """Whether events of the head come on top of the blocks."""
        return bool(self._heads)

    def sums_at(self, places: np.ndarray) -> np.ndarray:
        """int64 [N, P]: sums over blocks by their places in [M, W]."""
        return self._sums.reshape(self.num_keys, math.prod(self._sums.shape[1:]))[:, places]

    def numbers(self, measure: Measure, window: Window) -> list[np.ndarray]:
        """The representation's columns of a number or extreme, [N] each: int64 for sums, else float64. Fresh memory."""
        lower, head_lower = self._lower(measure, window)
        if not measure.is_invertible:
            parts = [self._covered(measure, column, lower) for column in measure.columns]
        else:
            at = [self._family.sum_columns.index(column) for column in measure.columns]
            if window.session_gap_us is None:
                width = self._family.lengths_us.index(window.length_us)
                parts = [self._sums[:, place, width].copy() for place in at]
            else:
                assert isinstance(lower, np.ndarray)
                sums = np.zeros((self.num_keys, len(self._family.sum_columns), 1), dtype=np.int64)
                self._summed(lower[:, None], sums)
                parts = [sums[:, place, 0].copy() for place in at]
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
            out = cover.combine(out, layer.covered(column, cover, run, lower, self._at.tick_us))
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
            if self.num_keys == 1:
                entries[0] += zip(*columns, strict=True)
                continue
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
        lower, _ = self._at.bounds(self._family.name, window.length_us)
        head_lower = self._at.anchor(self._family.name) - window.length_us
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
