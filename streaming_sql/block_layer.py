"""An immutable layer of 5-minute blocks of one feature group, sorted for reading: one run of blocks per key.

A group's state is a short tuple of layers (the bulk, then newer and smaller ones): a tick adds one, readers add up what each
layer answers, and layers of like size are merged now and then. Late rows need no special case: combining is associative and
commutative, so a block may be spread over layers. A rebuilt block is the exception: `without` empties it in the layers that are
there, and the new layer brings it whole.

Shape letters: R blocks, K runs (keys present here), M sum columns of a family, N keys asked for, W windows, E list entries.
Knows nothing of ticks' meaning, events or the lake.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from kernels.window_assembly import window_assembly
from streaming_sql.plan import Cover, GroupPlan
from warehouse.features.measures import Measure
from warehouse.time_algebra import FIVE_MINUTES_US

_RUN_SHIFT = 32  # block numbers stay below 2**32 until the year 42,000
ENTRY_SCHEMA = pa.schema([("row", pa.int64()), ("event_ts", pa.int64()), ("event_id", pa.string()), ("value", pa.string())])


@dataclass(frozen=True)
class Entries:
    """The lists of one last_n measure, laid end to end: by (row, event_ts, event_id), at most n per block."""

    row: np.ndarray
    event_ts: np.ndarray
    event_id: pa.Array
    value: pa.Array

    @classmethod
    def of(cls, table: pa.Table, n: int) -> "Entries":
        """table: ENTRY_SCHEMA. The newest n of each block are kept. Not of each row: retracting one of
        them brings back the one before."""
        ordered = table.take(pc.sort_indices(table, [(name, "ascending") for name in ("row", "event_ts", "event_id")]))
        place = _places(ordered["row"].to_numpy(), ordered["event_ts"].to_numpy())
        newer = np.searchsorted(place, place, side="right") - np.arange(len(place))  # 1 for the newest of its block
        ordered = ordered.filter(pa.array(newer <= n)).combine_chunks()
        row, event_ts, event_id, value = (_one_array(column) for column in ordered.columns)
        return cls(row.to_numpy(), event_ts.to_numpy(), event_id, value)

    def table(self) -> pa.Table:
        return pa.table([self.row, self.event_ts, self.event_id, self.value], schema=ENTRY_SCHEMA)

    def without(self, emptied: np.ndarray) -> "Entries":
        """Less the entries of some blocks. emptied: int64, their `_places`."""
        gone = np.isin(_places(self.row, self.event_ts), emptied)
        if not gone.any():
            return self
        kept = pa.array(~gone)
        return Entries(self.row[~gone], self.event_ts[~gone], self.event_id.filter(kept), self.value.filter(kept))

    def newest(self, row: int, lower_us: int, upper_us: int, n: int) -> list[tuple[int, str, str]]:
        """Up to n entries of the row with lower_us <= event_ts < upper_us, ascending."""
        first, end = np.searchsorted(self.row, [row, row + 1])
        low, high = first + np.searchsorted(self.event_ts[first:end], [lower_us, upper_us])
        low = max(low, high - n)
        if low >= high:
            return []
        ids, values = self.event_id.slice(low, high - low).to_pylist(), self.value.slice(low, high - low).to_pylist()
        return list(zip(self.event_ts[low:high].tolist(), ids, values, strict=True))


@dataclass(frozen=True)
class Blocks:
    """Block rows before they are sorted; `sums` [R, M] by family, `covers` [R] by column, NaN where NULL."""

    row: np.ndarray
    block_start: np.ndarray
    known_at: np.ndarray
    sums: dict[str, np.ndarray]
    covers: dict[str, np.ndarray]
    entries: dict[str, pa.Table]

    @classmethod
    def of(cls, plan: GroupPlan, row: np.ndarray, table: pa.Table) -> "Blocks":
        """From rows of `features.<group>`, `row` [R] being the row ids of their keys."""

        def numbers(name: str, dtype: type) -> np.ndarray:
            column = table[name]
            if dtype is np.int64:
                return pc.fill_null(column.cast(pa.int64()), 0).to_numpy()
            return pc.fill_null(column.cast(pa.float64()), float("nan")).to_numpy()

        return cls(
            row,
            instants(table["block_start"]),
            instants(table["known_at"]),
            {
                family.name: np.stack([numbers(name, np.int64) for name in family.sum_columns], axis=1)
                for family in plan.families
                if family.sum_columns
            },
            {name: numbers(name, np.float64) for name in plan.covers},
            {measure.name: _flatten(row, table[measure.name]) for measure in plan.sequences},
        )


def instants(column: pa.ChunkedArray) -> np.ndarray:
    """timestamptz → int64 microseconds."""
    return column.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()


def _flatten(row: np.ndarray, lists: pa.ChunkedArray) -> pa.Table:
    array = _one_array(lists)
    structs, owner = array.flatten(), pc.list_parent_indices(array).to_numpy()
    event_ts = pc.struct_field(structs, "event_ts").cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
    event_id, value = (pc.struct_field(structs, name).cast(pa.string()) for name in ("event_id", "value"))
    return pa.table([row[owner], event_ts, event_id, value], schema=ENTRY_SCHEMA)


def _places(row: np.ndarray, instant_us: np.ndarray) -> np.ndarray:
    """One int64 per (row, block), ascending in that order."""
    return (row.astype(np.int64) << _RUN_SHIFT) + instant_us // FIVE_MINUTES_US


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


@dataclass(frozen=True)
class BlockLayer:
    """Sorted, combined blocks. Arrays are never written after construction."""

    rows: np.ndarray
    """Row ids of the runs, ascending [K]."""
    run_offsets: torch.Tensor
    block_start: torch.Tensor
    known_at: np.ndarray
    """The latest arrival tick combined into each block [R]."""
    place: np.ndarray
    """run * 2**32 + block number, ascending [R]: what covers are searched by."""
    prefix: dict[str, torch.Tensor]
    """Per family, inclusive cumulative sums within each run [R, M]."""
    covers: dict[str, np.ndarray]
    entries: dict[str, Entries]

    @property
    def num_blocks(self) -> int:
        return len(self.known_at)

    @property
    def num_bytes(self) -> int:
        parts: list[Any] = [self.run_offsets, self.block_start, *self.prefix.values()]
        parts += [self.rows, self.known_at, self.place, *self.covers.values()]
        for entries in self.entries.values():
            parts += [entries.row, entries.event_ts, entries.event_id, entries.value]
        return sum(part.nbytes for part in parts)

    @classmethod
    def build(cls, plan: GroupPlan, blocks: Blocks) -> "BlockLayer":
        """Sorts by (row, block_start), combines rows of the same block, and sums up within runs."""
        order = np.lexsort((blocks.block_start, blocks.row))
        row, block_start = blocks.row[order], blocks.block_start[order]
        opens = np.ones(len(order), dtype=bool)
        opens[1:] = (row[1:] != row[:-1]) | (block_start[1:] != block_start[:-1])
        first = np.flatnonzero(opens)

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
            prefix[family] = torch.from_numpy(np.ascontiguousarray(running - before[run]))
        covers = {
            name: combined(np.where(np.isnan(blocks.covers[name]), cover.identity, blocks.covers[name]), cover.combine)
            for name, cover in plan.covers.items()
        }
        return cls(
            rows,
            torch.from_numpy(run_offsets),
            torch.from_numpy(np.ascontiguousarray(block_start)),
            known_at,
            (run.astype(np.int64) << _RUN_SHIFT) + block_start // FIVE_MINUTES_US,
            prefix,
            covers,
            {measure.name: Entries.of(blocks.entries[measure.name], _size_of(measure)) for measure in plan.sequences},
        )

    def blocks(self, plan: GroupPlan) -> Blocks:
        """The layer as rows again."""
        starts = self.run_offsets.numpy()[:-1]
        sums = {}
        for family, prefix in self.prefix.items():
            values = np.diff(prefix.numpy(), axis=0, prepend=np.zeros((1, prefix.shape[1]), dtype=np.int64))
            values[starts] = prefix.numpy()[starts]
            sums[family] = values
        covers = {name: _null_where_identity(self.covers[name], cover) for name, cover in plan.covers.items()}
        entries = {name: entries.table() for name, entries in self.entries.items()}
        row = np.repeat(self.rows, np.diff(self.run_offsets.numpy()))
        return Blocks(row, self.block_start.numpy(), self.known_at, sums, covers, entries)

    @classmethod
    def merge(cls, plan: GroupPlan, layers: Sequence["BlockLayer"], keep_from_us: int) -> "BlockLayer":
        """One layer that answers as all of `layers` do, for windows that begin at keep_from_us or later."""
        parts = [layer.blocks(plan) for layer in layers]
        kept = [part.block_start >= keep_from_us for part in parts]

        def joined(arrays: list[np.ndarray]) -> np.ndarray:
            return np.concatenate([array[keep] for array, keep in zip(arrays, kept, strict=True)])

        entries = {}
        for measure in plan.sequences:
            table = pa.concat_tables([part.entries[measure.name] for part in parts])
            entries[measure.name] = table.filter(pc.greater_equal(table["event_ts"], keep_from_us))
        return cls.build(
            plan,
            Blocks(
                joined([part.row for part in parts]),
                joined([part.block_start for part in parts]),
                joined([part.known_at for part in parts]),
                {name: joined([part.sums[name] for part in parts]) for name in parts[0].sums},
                {name: joined([part.covers[name] for part in parts]) for name in parts[0].covers},
                entries,
            ),
        )

    def without(self, plan: GroupPlan, row: np.ndarray, block_start: np.ndarray) -> "BlockLayer":
        """The layer with some blocks emptied: what a reader gets for them is the empty value. Copies what it
        changes; `self` when nothing does. row, block_start: int64 [E], E blocks that need not be here."""
        run = self.runs_of(row)
        wanted = (run[run >= 0].astype(np.int64) << _RUN_SHIFT) + block_start[run >= 0] // FIVE_MINUTES_US
        found = np.searchsorted(self.place, wanted)
        inside = found < len(self.place)
        blocks = np.unique(found[inside][self.place[found[inside]] == wanted[inside]])
        if not len(blocks):
            return self
        ends = self.run_offsets.numpy()[(self.place[blocks] >> _RUN_SHIFT) + 1].tolist()
        prefix = {}
        for family, sums in self.prefix.items():
            values = sums.numpy().copy()
            for block, end in zip(blocks.tolist(), ends, strict=True):
                opens = block == 0 or self.place[block - 1] >> _RUN_SHIFT != self.place[block] >> _RUN_SHIFT
                values[block:end] -= values[block] if opens else values[block] - values[block - 1]
            prefix[family] = torch.from_numpy(values)
        covers = {name: values.copy() for name, values in self.covers.items()}
        for name, cover in plan.covers.items():
            covers[name][blocks] = cover.identity
        emptied = _places(row, block_start)
        entries = {name: lists.without(emptied) for name, lists in self.entries.items()}
        return replace(self, prefix=prefix, covers=covers, entries=entries)

    def runs_of(self, row: np.ndarray) -> np.ndarray:
        """int64 [N]: the run of each row id here, -1 where it has none."""
        if not len(self.rows):
            return np.full(len(row), -1, dtype=np.int64)
        run = np.searchsorted(self.rows, row)
        run[run == len(self.rows)] = 0
        return np.where(self.rows[run] == row, run, -1)

    def windowed_sums(self, family: str, run: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """int64 [N, M, W]: each sum column over the blocks with lower [N, W] <= block_start < upper [N]."""
        prefix = self.prefix[family]
        out = window_assembly(
            self.block_start, prefix, self.run_offsets, torch.from_numpy(run), torch.from_numpy(lower), torch.from_numpy(upper)
        )
        return out.numpy().reshape(len(run), prefix.shape[1], lower.shape[1])

    def covered(self, column: str, cover: Cover, run: np.ndarray, lower_us: int, upper_us: int) -> np.ndarray:
        """float64 [N]: the column combined over the blocks of [lower_us, upper_us), both multiples of 5 minutes; the identity
        where there are none."""
        known = np.flatnonzero(run >= 0)
        out = np.full(len(run), cover.identity)
        base = run[known] << _RUN_SHIFT
        low = np.searchsorted(self.place, base + lower_us // FIVE_MINUTES_US)
        high = np.searchsorted(self.place, base + upper_us // FIVE_MINUTES_US)
        some = high > low
        known, low, length = known[some], low[some], (high - low)[some]
        if len(known):
            ends = np.cumsum(length)
            starts = ends - length
            index = np.arange(ends[-1]) + np.repeat(low - starts, length)
            out[known] = cover.combine.reduceat(self.covers[column][index], starts)
        return out


def _null_where_identity(values: np.ndarray, cover: Cover) -> np.ndarray:
    return np.where(values == cover.identity, np.nan, values) if np.isinf(cover.identity) else values


def _size_of(measure: Measure) -> int:
    assert measure.n is not None
    return measure.n
