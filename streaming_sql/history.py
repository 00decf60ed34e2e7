"""Arrivals that were read long ago: what a retraction needs to know of its target's block, looked up where it is kept.

The store holds blocks, not events, so to take an event out of one it must read the block's events again: from the lake, and
from the log what has not landed there yet. Knows nothing of ticks or the store.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import duckdb
import pyarrow as pa

from streaming_sql.event_log import Log, Position
from warehouse.connections import duckdb_connection
from warehouse.events import EVENTS_SCHEMA
from warehouse.lake import Lake
from warehouse.landing import EVENTS, landed_position
from warehouse.time_algebra import DUPLICATE_MEMORY_US, FIVE_MINUTES_US, FURTHEST_AHEAD_US

_READ_LIMIT = 50_000


class History(Protocol):
    """What the feed asks about the past."""

    def around(self, event_ids: Iterable[str], keys: Sequence[tuple[str, ...]], position: Position, since_us: int) -> pa.Table:
        """Every arrival below the position, EVENTS_SCHEMA, that may decide a block which one of the events is in.

        Those are the events, all that share one of `keys` (columns; none: all) and a 5-minute block with one, what retracts any
        of these, and every further arrival of their ids. Blocks before since_us (microseconds) may be left out.
        """


def around_sql(keys: Sequence[tuple[str, ...]]) -> str:
    """DuckDB `select` of `History.around` from the relations `history` (EVENTS_SCHEMA) and `asked` (event_id)."""
    names = "".join(f", {column}" for column in sorted({column for columns in keys for column in columns}))
    neighbours = [
        "select near.event_id from near inner join targets on "
        + "".join(f"near.{key} = targets.{key} and " for key in columns)
        + "near.block = targets.block"
        for columns in sorted(set(keys))
    ]
    return f"""
        with targets as materialized (
            select epoch_us(event_ts) // {FIVE_MINUTES_US} as block{names} from history
            where event_id in (select event_id from asked)
        ),
        near as materialized (
            select event_id, event_type, retracts, epoch_us(event_ts) // {FIVE_MINUTES_US} as block{names} from history
            where event_type = 'retraction' or epoch_us(event_ts) // {FIVE_MINUTES_US} in (select block from targets)
        ),
        wanted as materialized (select event_id from asked union {" union ".join(neighbours)}),
        retracting as (select event_id from near where event_type = 'retraction' and retracts in (select event_id from wanted))
        select {", ".join(EVENTS_SCHEMA.names)} from history
        where event_id in (select event_id from wanted union select event_id from retracting)
    """


def asked(event_ids: Iterable[str]) -> pa.Table:
    return pa.table({"event_id": pa.array(list(event_ids), pa.string())})


def oldest_landing_us(since_us: int) -> int:
    """No arrival that landed before this decides a block that starts at since_us or later: an event is at most F ahead of its
    landing, its retraction at most H before it, and either may be a duplicate of what landed H before."""
    return max(since_us - FURTHEST_AHEAD_US - 2 * DUPLICATE_MEMORY_US, 0)


def below_sql(position: Position) -> str:
    """A condition on log_partition and log_offset."""
    return " or ".join(f"(log_partition = {partition} and log_offset < {end})" for partition, end in enumerate(position))


class LakeAndLog:
    """The history of a running server. Not thread-safe."""

    def __init__(self, lake: Lake, log: Log):
        self._lake, self._log = lake, log
        self._connection: duckdb.DuckDBPyConnection | None = None

    def around(self, event_ids: Iterable[str], keys: Sequence[tuple[str, ...]], position: Position, since_us: int) -> pa.Table:
        if self._connection is None:
            self._connection = duckdb_connection()
        connection = self._connection
        landed = landed_position(self._lake)
        in_lake = tuple(min(pair) for pair in zip(landed, position, strict=True))
        # tables of DuckDB's own: its joins push filters down that scans of Arrow tables do not know
        for name, rows in (("asked", asked(event_ids)), ("in_log", self._not_landed(landed, position))):
            connection.register("given", rows)
            connection.execute(f"create or replace temp table {name} as select * from given")
            connection.unregister("given")
        names = ", ".join(EVENTS_SCHEMA.names)
        connection.execute(
            f"create or replace temp view history as "
            f"select {names} from ({self._lake.view_sql(EVENTS)}) as landed "
            f"where landed_at >= make_timestamptz({oldest_landing_us(since_us)}) and ({below_sql(in_lake)}) "
            f"union all select {names} from in_log where {below_sql(position)}"
        )
        return connection.execute(around_sql(keys)).to_arrow_table().cast(EVENTS_SCHEMA)

    def _not_landed(self, landed: Position, position: Position) -> pa.Table:
        """The log's records from the landed position to at least `position`."""
        parts, at = [EVENTS_SCHEMA.empty_table()], list(landed)
        while any(there < end for there, end in zip(at, position, strict=True)):
            records = self._log.read(tuple(at), _READ_LIMIT)
            if records.num_rows == 0:
                break
            parts.append(records)
            for partition, offset in zip(records["log_partition"].to_pylist(), records["log_offset"].to_pylist(), strict=True):
                at[partition] = max(at[partition], offset + 1)
        return pa.concat_tables(parts)
