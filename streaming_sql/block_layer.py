"""An immutable layer of 5-minute blocks of one feature group, sorted for reading: one run of blocks per key.

A group's state is a short tuple of layers (the bulk, then newer and smaller ones): a tick adds one, readers add up what each
layer answers, and layers of like size are merged now and then. Late rows need no special case: combining is associative and
commutative, so a block may be spread over layers. A rebuilt block is the exception: `without` empties it in the layers that are
there, and the new layer brings it whole.

Shape letters: R blocks, K runs (keys present here), M sum columns of a family, N keys asked for, W windows, E blocks found.
Knows nothing of ticks' meaning, events or the lake.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numba import types

from kernels.window_assembly import window_assembly
from streaming_sql import moments
from streaming_sql.entry_maps import EntryMaps
from streaming_sql.event_lists import EventLists, flattened
from streaming_sql.plan import Cover, GroupPlan
from streaming_sql.ragged import ROW_SHIFT, Instants, blocks_of, laid_out, one_or_each, opens, places, stretches
from streaming_sql.text_codes import TextCodes
from warehouse.compiled import compiled, only_read
from warehouse.features.measures import Measure
from warehouse.time_algebra import FIVE_MINUTES_US

_FEW_KEYS = 32


@dataclass(frozen=True)
class Blocks:
    """Block rows before they are sorted; `sums` [R, M] by family, `covers` [R] by column, NaN where NULL, `moments` [R, 3],
    `lists` and `maps` by measure."""

    row: np.ndarray
    block_start: np.ndarray
    known_at: np.ndarray
    sums: dict[str, np.ndarray]
    covers: dict[str, np.ndarray]
    moments: dict[str, np.ndarray]
    lists: dict[str, pa.Table]
    maps: dict[str, EntryMaps]

    @classmethod
    def of(cls, plan: GroupPlan, row: np.ndarray, table: pa.Table, codes: TextCodes) -> "Blocks":
        """From rows of `features.<group>`, `row` [R] being the row ids of their keys and `codes` the group's."""

        def numbers(name: str, dtype: type) -> np.ndarray:
            column = table[name]
            if dtype is np.int64:
                return pc.fill_null(column.cast(pa.int64()), 0).to_numpy()
            return pc.fill_null(column.cast(pa.float64()), float("nan")).to_numpy()

        block_start = instants(table["block_start"])
        return cls(
            row,
            block_start,
            instants(table["known_at"]),
            {
                family.name: np.stack([numbers(name, np.int64) for name in family.sum_columns], axis=1)
                for family in plan.families
                if family.sum_columns
            },
            {name: numbers(name, np.float64) for name in plan.covers},
            {
                measure.name: np.nan_to_num(np.stack([numbers(name, np.float64) for name in measure.columns], axis=1))
                for measure in plan.moments
            },
            {measure.name: flattened(row, table[measure.name]) for measure in plan.lists},
            {
                name: EntryMaps.of_lists(shape, row, block_start, [table[column] for column in shape.columns], codes)
                for name, shape in plan.maps.items()
            },
        )


def instants(column: pa.ChunkedArray) -> np.ndarray:
    """timestamptz → int64 microseconds."""
    return column.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()


@dataclass(frozen=True)
class BlockLayer:
    """Sorted, combined blocks. Arrays are never written after construction."""

    rows: np.ndarray
    """Row ids of the runs, ascending [K]."""
    run_offsets: np.ndarray
    block_start: np.ndarray
    known_at: np.ndarray
    """The latest arrival tick combined into each block [R]."""
    place: np.ndarray
    """run * 2**32 + block number, ascending [R]: what covers are searched by."""
    prefix: dict[str, np.ndarray]
    """Per family, inclusive cumulative sums within each run [R, M]."""
    covers: dict[str, np.ndarray]
    moments: dict[str, np.ndarray]
    lists: dict[str, EventLists]
    maps: dict[str, EntryMaps]

    @property
    def num_blocks(self) -> int:
        return len(self.known_at)

    @property
    def num_bytes(self) -> int:
        parts: list[Any] = [self.run_offsets, self.block_start, *self.prefix.values()]
        parts += [self.rows, self.known_at, self.place, *self.covers.values()]
        parts += [*self.moments.values(), *self.lists.values(), *self.maps.values()]
        return sum(part.nbytes for part in parts)

    @classmethod
    def build(cls, plan: GroupPlan, blocks: Blocks) -> "BlockLayer":
        """Sorts by (row, block_start), combines rows of the same block, and sums up within runs."""
        order = np.lexsort((blocks.block_start, blocks.row))
        row, block_start = blocks.row[order], blocks.block_start[order]
        first = opens(row, block_start)

        def combined(values: np.ndarray, combine: np.ufunc) -> np.ndarray:
            return combine.reduceat(values[order], first, axis=0) if len(first) else values[order]

        known_at = combined(blocks.known_at, np.maximum)
        row, block_start = row[first], block_start[first]
        rows, starts = np.unique(row, return_index=True)
        run_offsets = np.append(starts, len(row)).astype(np.int64)
        run = np.repeat(np.arange(len(rows)), np.diff(run_offsets))
        prefix = {}
        for family, values in blocks.sums.items():
            running = np.cumsum(combined(values, np.add), axis=0)
            before = np.vstack([np.zeros((1, running.shape[1]), dtype=np.int64), running])[starts]
            prefix[family] = np.ascontiguousarray(running - before[run])
        covers = {
            name: combined(np.where(np.isnan(blocks.covers[name]), cover.identity, blocks.covers[name]), cover.combine)
            for name, cover in plan.covers.items()
        }
        return cls(
            rows,
            run_offsets,
            np.ascontiguousarray(block_start),
            known_at,
            places(run, block_start),
            prefix,
            covers,
            {name: moments.merged_by(values[order], first) for name, values in blocks.moments.items()},
            {measure.name: EventLists.of(blocks.lists[measure.name], measure) for measure in plan.lists},
            blocks.maps,
        )

    def blocks(self, plan: GroupPlan) -> Blocks:
        """The layer as rows again."""
        starts = self.run_offsets[:-1]
        sums = {}
        for family, prefix in self.prefix.items():
            values = np.diff(prefix, axis=0, prepend=np.zeros((1, prefix.shape[1]), dtype=np.int64))
            values[starts] = prefix[starts]
            sums[family] = values
        covers = {name: _null_where_identity(self.covers[name], cover) for name, cover in plan.covers.items()}
        lists = {name: lists.table() for name, lists in self.lists.items()}
        row = np.repeat(self.rows, np.diff(self.run_offsets))
        return Blocks(row, self.block_start, self.known_at, sums, covers, self.moments, lists, self.maps)

    @classmethod
    def merge(cls, plan: GroupPlan, layers: Sequence["BlockLayer"], keep_from_us: int) -> "BlockLayer":
        """One layer that answers as all of `layers` do, for windows that begin at keep_from_us or later."""
        parts = [layer.blocks(plan) for layer in layers]
        kept = [part.block_start >= keep_from_us for part in parts]

        def joined(arrays: list[np.ndarray]) -> np.ndarray:
            return np.concatenate([array[keep] for array, keep in zip(arrays, kept, strict=True)])

        lists = {}
        for measure in plan.lists:
            table = pa.concat_tables([part.lists[measure.name] for part in parts])
            lists[measure.name] = table.filter(pc.greater_equal(table["event_ts"], keep_from_us))
        maps = {}
        for name, shape in plan.maps.items():
            merged = EntryMaps.merge(shape, [part.maps[name] for part in parts])
            maps[name] = merged.kept(blocks_of(merged.place) >= keep_from_us)
        return cls.build(
            plan,
            Blocks(
                joined([part.row for part in parts]),
                joined([part.block_start for part in parts]),
                joined([part.known_at for part in parts]),
                {name: joined([part.sums[name] for part in parts]) for name in parts[0].sums},
                {name: joined([part.covers[name] for part in parts]) for name in parts[0].covers},
                {name: joined([part.moments[name] for part in parts]) for name in parts[0].moments},
                lists,
                maps,
            ),
        )

    def without(self, plan: GroupPlan, row: np.ndarray, block_start: np.ndarray) -> "BlockLayer":
        """The layer with some blocks emptied: what a reader gets for them is the empty value. Copies what it
        changes; `self` when nothing does. row, block_start: int64 [E], E blocks that need not be here."""
        run = self.runs_of(row)
        wanted = places(run[run >= 0], block_start[run >= 0])
        found = np.searchsorted(self.place, wanted)
        inside = found < len(self.place)
        blocks = np.unique(found[inside][self.place[found[inside]] == wanted[inside]])
        if not len(blocks):
            return self
        ends = self.run_offsets[(self.place[blocks] >> ROW_SHIFT) + 1].tolist()
        prefix = {}
        for family, sums in self.prefix.items():
            values = sums.copy()
            for block, end in zip(blocks.tolist(), ends, strict=True):
                opens = block == 0 or self.place[block - 1] >> ROW_SHIFT != self.place[block] >> ROW_SHIFT
                values[block:end] -= values[block] if opens else values[block] - values[block - 1]
            prefix[family] = values
        covers = {name: values.copy() for name, values in self.covers.items()}
        for name, cover in plan.covers.items():
            covers[name][blocks] = cover.identity
        spreads = {name: values.copy() for name, values in self.moments.items()}
        for values in spreads.values():
            values[blocks] = moments.NOTHING
        emptied = places(row, block_start)
        lists = {name: held.without(emptied) for name, held in self.lists.items()}
        maps = {name: held.without(emptied) for name, held in self.maps.items()}
        return replace(self, prefix=prefix, covers=covers, moments=spreads, lists=lists, maps=maps)

    def runs_of(self, row: np.ndarray) -> np.ndarray:
        """int64 [N]: the run of each row id here, -1 where it has none."""
        run = np.empty(len(row), dtype=np.int64)
        _find_runs(self.rows, row, run)
        return run

    def rows_known_after(self, instant_us: int) -> np.ndarray:
        """int64, ascending: row ids with a block that was known later than this."""
        is_found = np.empty(len(self.rows), dtype=np.bool_)
        _find_known_after(self.run_offsets, self.known_at, instant_us, is_found)
        return self.rows[is_found]

    def rows_within(self, spans_S2: np.ndarray) -> np.ndarray:
        """int64, ascending: row ids with a block that starts in one of the spans [from, until), int64."""
        is_found = np.empty(len(self.rows), dtype=np.bool_)
        _find_within(self.run_offsets, self.block_start, spans_S2, is_found)
        return self.rows[is_found]

    def add_sums(self, family: str, run: np.ndarray, lower: np.ndarray, upper_us: int, out: np.ndarray) -> None:
        """Adds each sum column over the blocks with lower <= block_start < upper_us to out, int64 [N, M, W]. lower: int64
        [N, W], or [1, W] for all."""
        prefix = self.prefix[family]
        if len(run) <= _FEW_KEYS:
            _add_few_sums(prefix, self.place, self.run_offsets, run, lower, upper_us, ROW_SHIFT, FIVE_MINUTES_US, out)
            return
        lower_NW = np.empty((len(run), lower.shape[1]), dtype=np.int64)  # torch wants memory that may be written
        lower_NW[:] = lower
        at = (self.block_start, prefix, self.run_offsets, run, lower_NW, np.full(len(run), upper_us))
        out += window_assembly(*map(torch.from_numpy, at)).numpy().reshape(out.shape)

    def cover(self, column: str, cover: Cover, run: np.ndarray, lower_us: Instants, upper_us: int, out: np.ndarray) -> None:
        """Combines the column over the blocks of [lower_us, upper_us), both multiples of 5 minutes, with out, float64 [N]."""
        values = self.covers[column]
        if cover.combine is np.add:
            some, index, first = self._found(run, lower_us, upper_us)
            if len(some):
                out[some] += np.add.reduceat(values[index], first)
            return
        at = (self.place, self.run_offsets, run, one_or_each(lower_us), upper_us)
        _find_extremes(values, *at, ROW_SHIFT, FIVE_MINUTES_US, cover.identity > 0, out)

    def moments_of(self, measure: Measure, run: np.ndarray, lower_us: Instants, upper_us: int) -> np.ndarray:
        """float64 [N, 3]: (n, mean, M2) over the blocks of [lower_us, upper_us)."""
        out = np.zeros((len(run), 3))
        some, index, first = self._found(run, lower_us, upper_us)
        out[some] = moments.merged_by(self.moments[measure.name][index], first)
        return out

    def _found(self, run: np.ndarray, lower_us: Instants, upper_us: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which of N runs have blocks there, the blocks [E], and where in these each such run begins."""
        low, high = stretches(self.place, run, lower_us, upper_us)
        some = np.flatnonzero(high > low)
        if not len(some):
            return some, some, some
        low, length = low[some], (high - low)[some]
        ends = np.cumsum(length)
        first = ends - length
        return some, np.arange(ends[-1]) + np.repeat(low - first, length), first

    def held_blocks(
        self, plan: GroupPlan, measure: Measure, row: np.ndarray, lower_us: int, upper_us: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(owner [E], block_start [E]): the blocks of [lower_us, upper_us) that hold an event of the measure's set."""
        if measure.representation in ("events", "map"):
            held = self.maps[measure.name] if measure.name in self.maps else self.lists[measure.name]
            index, owner = laid_out(*stretches(held.place, row, lower_us, upper_us))
            return owner, blocks_of(held.place[index])
        index, owner = laid_out(*stretches(self.place, self.runs_of(row), lower_us, upper_us))
        is_held = self._holds(plan, measure, index)
        return owner[is_held], blocks_of(self.place[index[is_held]])

    def _holds(self, plan: GroupPlan, measure: Measure, index: np.ndarray) -> np.ndarray:
        """bool [E]: whether each of the blocks holds an event of the set of a number, extreme or moments."""
        column = measure.columns[-1]  # the count, where there is one beside the sum
        if measure.representation == "moments":
            return self.moments[measure.name][index, 0] > 0
        if column in plan.covers:
            return self.covers[column][index] != plan.covers[column].identity
        family = next(family for family in plan.families if column in family.sum_columns)
        sums = self.prefix[family.name][:, family.sum_columns.index(column)]
        opens_run = np.isin(index, self.run_offsets[:-1])
        return sums[index] != np.where(opens_run, 0, sums[index - 1])


def _null_where_identity(values: np.ndarray, cover: Cover) -> np.ndarray:
    return np.where(values == cover.identity, np.nan, values) if np.isinf(cover.identity) else values


_NUMBERS, _ROWS = (only_read(types.int64, ndim) for ndim in (1, 2))


@compiled(types.void(_ROWS, *(_NUMBERS,) * 3, _ROWS, *(types.int64,) * 3, types.int64[:, :, ::1]))
def _add_few_sums(
    prefix: np.ndarray,
    place: np.ndarray,
    run_offsets: np.ndarray,
    run: np.ndarray,
    lower: np.ndarray,
    upper: int,
    row_shift: int,
    block_us: int,
    out: np.ndarray,
) -> None:
    """`BlockLayer.add_sums`: for one reader it takes a tenth of the kernel's time, whose operations are made for thousands
    of keys."""
    for n in range(len(run)):
        if run[n] < 0:
            continue
        begin, end = run_offsets[run[n]], run_offsets[run[n] + 1]
        for w in range(-1, lower.shape[1]):  # what lies below the upper edge, less what lies below each lower one
            edge = upper if w < 0 else min(lower[n if len(lower) > 1 else 0, w], upper)
            wanted = (run[n] << row_shift) + max(edge, 0) // block_us
            at = begin + np.searchsorted(place[begin:end], wanted)
            if at == begin:
                continue
            for m in range(prefix.shape[1]):
                if w < 0:
                    out[n, m, :] += prefix[at - 1, m]
                else:
                    out[n, m, w] -= prefix[at - 1, m]


@compiled(types.void(_NUMBERS, _NUMBERS, types.int64[::1]))
def _find_runs(rows: np.ndarray, wanted: np.ndarray, run: np.ndarray) -> None:
    for n in range(len(wanted)):
        at = np.searchsorted(rows, wanted[n])
        run[n] = at if at < len(rows) and rows[at] == wanted[n] else -1


@compiled(types.void(_NUMBERS, _NUMBERS, types.int64, types.boolean[::1]))
def _find_known_after(run_offsets: np.ndarray, known_at: np.ndarray, instant: int, is_found: np.ndarray) -> None:
    for k in range(len(is_found)):
        is_found[k] = False
        for b in range(run_offsets[k], run_offsets[k + 1]):
            is_found[k] |= known_at[b] > instant


@compiled(types.void(_NUMBERS, _NUMBERS, only_read(types.int64, 2), types.boolean[::1]))
def _find_within(run_offsets: np.ndarray, block_start: np.ndarray, spans_S2: np.ndarray, is_found: np.ndarray) -> None:
    for k in range(len(is_found)):
        is_found[k] = False
        begin, end = run_offsets[k], run_offsets[k + 1]
        for s in range(len(spans_S2)):
            at = begin + np.searchsorted(block_start[begin:end], spans_S2[s, 0])
            is_found[k] |= at < end and block_start[at] < spans_S2[s, 1]


@compiled(types.void(only_read(types.float64), *(_NUMBERS,) * 4, *(types.int64,) * 3, types.boolean, types.float64[::1]))
def _find_extremes(
    values: np.ndarray,
    place: np.ndarray,
    run_offsets: np.ndarray,
    run: np.ndarray,
    lower: np.ndarray,
    upper: int,
    row_shift: int,
    block_us: int,
    is_least: bool,
    out: np.ndarray,
) -> None:
    """The least, or the largest, of what out holds and the blocks with lower <= block_start < upper. lower: [N], or [1]."""
    for n in range(len(run)):
        if run[n] < 0:
            continue
        begin, end = run_offsets[run[n]], run_offsets[run[n] + 1]
        base = run[n] << row_shift
        at = begin + np.searchsorted(place[begin:end], base + max(lower[n if len(lower) > 1 else 0], 0) // block_us)
        while at < end and place[at] < base + upper // block_us:
            if (values[at] < out[n]) if is_least else (values[at] > out[n]):
                out[n] = values[at]
            at += 1
