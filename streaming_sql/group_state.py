"""One feature group of one view: layers of blocks and the head, read together. Immutable, so a request sees one instant.

Shape letters: N keys asked for, F features, M sum columns of a family, W window lengths of a family.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streaming_sql.block_layer import BlockLayer
from streaming_sql.head import Head
from streaming_sql.key_index import Key, KeyIndex
from streaming_sql.plan import Family, GroupPlan, columns_of, cover_of
from warehouse.features.measures import Measure
from warehouse.time_algebra import Window, floor_5m


@dataclass(frozen=True)
class FeatureMatrix:
    """Values of one group: `values` float64 [N, F] in the order of `names`, NaN for NULL; `sequences` oldest first."""

    names: tuple[str, ...]
    values: np.ndarray
    sequences: dict[str, list[list[str]]]


@dataclass(frozen=True)
class Instant:
    """What a read is made at: the tick T, the log position K, and the request's t; microseconds."""

    tick_us: int
    position: tuple[int, ...]
    t_us: int

    def bounds(self, family: str, length_us: int) -> tuple[int, int]:
        """[lower, upper) in event time over blocks; a fresh measure's head goes on from upper to t."""
        anchor = self.tick_us if family == "tick" else floor_5m(self.t_us)
        return min(anchor - length_us, self.tick_us), self.tick_us

    def head_lower(self, window: Window) -> int:
        return floor_5m(self.t_us) - window.length_us


@dataclass(frozen=True)
class GroupState:
    """Layers and head of one group."""

    plan: GroupPlan
    index: KeyIndex
    layers: tuple[BlockLayer, ...]
    head: Head
    fresh_layers: tuple[BlockLayer, ...] | None = None
    """What event-fresh measures read instead of `layers`, where the view's position knows
    retractions that its tick does not."""

    def layers_of(self, family: str) -> tuple[BlockLayer, ...]:
        return self.layers if family != "event" or self.fresh_layers is None else self.fresh_layers

    def assemble(self, keys: Sequence[Key], at: Instant) -> FeatureMatrix:
        """All features of the group for the keys (unknown keys get the empty values)."""
        rows = self.index.find(keys)
        heads: list[list] = [[]] * len(keys)
        if self.plan.fresh and len(self.head):
            heads = [self.head.visible(tuple(key), at.position, at.t_us) for key in keys]
        values: dict[str, np.ndarray] = {}
        sequences: dict[str, list[list[str]]] = {}
        for family in self.plan.families:
            runs = [layer.runs_of(rows) for layer in self.layers_of(family.name)]
            sums = self._sums(family, runs, len(keys), at)
            for measure in family.measures:
                if measure.is_sequence:
                    for window in measure.windows:
                        name = f"{self.plan.group.entity}_{measure.name}_{window.name}"
                        sequences[name] = self._sequences(measure, window, rows, heads, at)
                    continue
                for window in measure.windows:
                    parts = [
                        self._part(family, measure, column, window, runs, sums, at, len(keys)) for column in columns_of(measure)
                    ]
                    if family.name == "event":
                        self._add_head(measure, window, parts, heads, at)
                    values[f"{measure.name}_{window.name}"] = _finalized(measure, parts)
        columns = [*values.values(), *(derived(values) for derived in self.plan.derived)]
        declared = [f"{m.name}_{w.name}" for m in self.plan.group.measures if not m.is_sequence for w in m.windows]
        columns[: len(declared)] = [values[name] for name in declared]
        matrix = np.empty((len(keys), len(columns)))
        for place, column in enumerate(columns):
            matrix[:, place] = column
        return FeatureMatrix(self.plan.group.feature_names, matrix, sequences)

    def _sums(self, family: Family, runs: list[np.ndarray], num_keys: int, at: Instant) -> np.ndarray:
        """int64 [N, M, W]."""
        out = np.zeros((num_keys, len(family.sum_columns), len(family.lengths_us)), dtype=np.int64)
        if out.size == 0:
            return out
        bounds = [at.bounds(family.name, length) for length in family.lengths_us]
        lower = np.tile(np.array([low for low, _ in bounds], dtype=np.int64), (num_keys, 1))
        upper = np.full(num_keys, at.tick_us, dtype=np.int64)
        for layer, run in zip(self.layers_of(family.name), runs, strict=True):
            out += layer.windowed_sums(family.name, run, lower, upper)
        return out

    def _part(
        self,
        family: Family,
        measure: Measure,
        column: str,
        window: Window,
        runs: list[np.ndarray],
        sums: np.ndarray,
        at: Instant,
        num_keys: int,
    ) -> np.ndarray:
        """[N]: one representation column over one window of blocks; int64 for sums, else float64. Fresh memory."""
        if measure.is_invertible:
            return sums[:, family.sum_columns.index(column), family.lengths_us.index(window.length_us)].copy()
        cover = cover_of(measure)
        lower, upper = at.bounds(family.name, window.length_us)
        out = np.full(num_keys, cover.identity)
        for layer, run in zip(self.layers_of(family.name), runs, strict=True):
            out = cover.combine(out, layer.covered(column, cover, run, lower, upper))
        return out

    def _add_head(self, measure: Measure, window: Window, parts: list[np.ndarray], heads: list[list], at: Instant) -> None:
        place, lower = self.plan.fresh.index(measure), at.head_lower(window)
        for n, events in enumerate(heads):
            for event in events:
                value = event.values[place]
                if value is None or event.event_ts < lower:
                    continue
                if measure.aggregation == "count":
                    parts[0][n] += 1
                elif measure.aggregation == "avg":
                    parts[0][n] += value
                    parts[1][n] += 1
                else:
                    parts[0][n] = cover_of(measure).combine(parts[0][n], value)

    def _sequences(self, measure: Measure, window: Window, rows: np.ndarray, heads: list[list], at: Instant) -> list[list[str]]:
        assert measure.n is not None
        family = "event" if measure.freshness == "event" else measure.anchor
        lower, upper = at.bounds(family, window.length_us)
        place = self.plan.fresh.index(measure) if family == "event" else -1
        lists = []
        for n, row in enumerate(rows.tolist()):
            entries: list[tuple[int, str, Any]] = []
            if row >= 0:
                for layer in self.layers_of(family):
                    entries += layer.entries[measure.name].newest(row, lower, upper, measure.n)
            if family == "event":
                entries += [
                    (event.event_ts, event.event_id, event.values[place])
                    for event in heads[n]
                    if event.values[place] is not None and event.event_ts >= at.head_lower(window)
                ]
            lists.append([value for _, _, value in sorted(entries)[-measure.n :]])
        return lists


def _finalized(measure: Measure, parts: list[np.ndarray]) -> np.ndarray:
    """float64 [N], NaN for NULL."""
    if measure.aggregation == "avg":
        total, count = parts[0].astype(np.float64), parts[1].astype(np.float64)
        return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    if measure.aggregation in ("min", "max"):
        return np.where(np.isinf(parts[0]), np.nan, parts[0])
    return parts[0].astype(np.float64)
