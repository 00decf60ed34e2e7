"""Answers for more features than the memory holds at once: batch by batch over the whole spine, through files on disk.

A feature's state grows with the block rows of its group, not with the spine. Where the states of a plan are too large together,
its features are computed some at a time; each batch leaves a file with one row group per chunk of reads, and the files are read
side by side. Every value is the one that a single pass gives.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from warehouse.features.compute_engine import Engine
from warehouse.features.compute_plan import Plan, plan
from warehouse.features.compute_source import Relations, state_columns
from warehouse.features.compute_spine import Reads, Span

STATE_BYTES = 4 << 30
"""How much of what is read and summed up may be in memory at once."""
_BYTES_PER_VALUE = 9
"""A column of a block row as it is read, then summed up: each column is let go before the next is summed."""


def answers(
    connection: duckdb.DuckDBPyConnection,
    relations: Mapping[str, Relations],
    what: Plan,
    span: Span,
    chunks: Callable[[], Iterator[Reads]],
    scratch: Path,
) -> Iterator[dict[str, pa.Array]]:
    """The plan's features, in its order and types, for each chunk of reads.

    chunks: gives the same chunks at every call. scratch: an existing folder; its files are gone when the answers end.
    """
    some = batches(what, {name: _num_rows(connection, places.blocks) for name, places in relations.items()})
    if len(some) == 1:
        engine = Engine(connection, relations, what, span)
        yield from map(engine.columns, chunks())
        return
    with tempfile.TemporaryDirectory(prefix="features-", dir=scratch) as folder:
        paths = [Path(folder) / f"{number}.parquet" for number in range(len(some))]
        for batch, path in zip(some, paths, strict=True):
            engine = Engine(connection, relations, batch, span)
            with pq.ParquetWriter(
                path, pa.schema(list(batch.types().items())), compression="zstd", compression_level=1
            ) as writer:
                for reads in chunks():
                    writer.write_table(pa.table(engine.columns(reads)), row_group_size=max(len(reads), 1))
            del engine
        yield from _side_by_side(paths, what)


def batches(what: Plan, num_rows: Mapping[str, int]) -> list[Plan]:
    """The plan cut into plans whose states fit, in the order of its features; num_rows: block rows by group."""
    if _state_bytes(what, num_rows) <= STATE_BYTES:
        return [what]
    groups = {group.name: group for group in what.groups}
    found: list[list[str]] = []
    fits: Plan | None = None
    for name in what.features:
        if fits is not None:
            wider = plan(groups, (), [*found[-1], name])
            if _state_bytes(wider, num_rows) <= STATE_BYTES:
                found[-1].append(name)
                fits = wider
                continue
        found.append([name])
        fits = plan(groups, (), [name])
    return [plan(groups, (), names) for names in found]


def _state_bytes(what: Plan, num_rows: Mapping[str, int]) -> int:
    return sum(state_columns(group) * num_rows[group.name] * _BYTES_PER_VALUE for group in what.groups)


def _num_rows(connection: duckdb.DuckDBPyConnection, relation: str) -> int:
    return connection.execute(f"select count(*) from {relation}").fetchall()[0][0]


def _side_by_side(paths: list[Path], what: Plan) -> Iterator[dict[str, pa.Array]]:
    files = [pq.ParquetFile(path) for path in paths]
    try:
        for number in range(files[0].num_row_groups):
            found = {name: column for file in files for name, column in _columns(file.read_row_group(number)).items()}
            yield {name: found[name] for name in what.features}
    finally:
        for file in files:
            file.close()


def _columns(rows: pa.Table) -> dict[str, pa.Array]:
    return {name: pa.concat_arrays(column.chunks) for name, column in zip(rows.column_names, rows.columns, strict=True)}
