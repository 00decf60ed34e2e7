"""Arrivals that were read long ago: what a retraction needs to know of its target's block, looked up where it is kept.

The store holds blocks, not events, so to take an event out of one it must read the block's events again: from the lake, and
from the log what has not landed there yet. Knows nothing of ticks or the store.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import duckdb
import pyarrow as pa
from pyiceberg.table import Table

from streaming_sql.event_index import BLOCK, INDEX_FOLDER, EventIndex, sought
from streaming_sql.event_log import Log, Position
from warehouse.connections import duckdb_connection
from warehouse.data_files import DataFiles
from warehouse.events import EVENTS_SCHEMA
from warehouse.home import Home
from warehouse.lake import Lake, parquet_sql
from warehouse.landing import EVENTS, position_of
from warehouse.time_algebra import DUPLICATE_MEMORY_US, FIVE_MINUTES_US, FURTHEST_AHEAD_US

_LOG = logging.getLogger("headrace.stream")
_READ_LIMIT = 50_000
_FEW = 1000
"""Instants that a condition lists."""


class History(Protocol):
    """What the feed asks about the past."""

    def around(self, event_ids: Iterable[str], keys: Sequence[tuple[str, ...]], position: Position, since_us: int) -> pa.Table:
        """Every arrival below the position, EVENTS_SCHEMA, that may decide a block which one of the events is in.

        Those are the events, all that share one of `keys` (columns; none: all) and a 5-minute block with one, what retracts any
        of these, and every further arrival of their ids. Blocks before since_us (microseconds) may be left out.
        """


Holding = Callable[[str, str], str]
"""(column, a query of values) → a relation of at least all arrivals with one in the column: event_id, retracts or block."""


def _all(column: str, values: str) -> str:
    return "history"


def around(connection: duckdb.DuckDBPyConnection, keys: Sequence[tuple[str, ...]], holding: Holding = _all) -> pa.Table:
    """`History.around` on a DuckDB that has the relations `history` (EVENTS_SCHEMA) and `asked` (event_id).

    Each look is bounded by landing times: an event of a block landed at most F before its start and H after its end (others are
    dead letters), and H before a landing nothing decides about it. holding: where there is less to look at than `history`.
    """
    columns = sorted({column for columns in keys for column in columns})
    names = "".join(f", {column}" for column in columns)
    connection.execute(
        f"create or replace temp table targets as select {BLOCK} as block{names} "
        f"from {holding('event_id', 'select event_id from asked')} "
        "where event_type <> 'retraction' and event_id in (select event_id from asked)"
    )
    first, last = connection.execute("select min(block), max(block) from targets").fetchall()[0]
    if first is None:
        return EVENTS_SCHEMA.empty_table()
    from_us, until_us = first * FIVE_MINUTES_US - FURTHEST_AHEAD_US, (last + 1) * FIVE_MINUTES_US + DUPLICATE_MEMORY_US
    connection.execute(
        f"create or replace temp table near as select event_id, landed_at, {BLOCK} as block{names} "
        f"from {holding('block', 'select block from targets')} "
        f"where {_landed(from_us, until_us)} and {BLOCK} in (select block from targets)"
    )
    neighbours = [
        "select near.event_id, near.landed_at from near inner join targets on "
        + "".join(f"near.{key} = targets.{key} and " for key in columns)
        + "near.block = targets.block"
        for columns in sorted(set(keys))
    ]
    connection.execute(
        "create or replace temp table wanted as select event_id, landed_at from near "
        f"where event_id in (select event_id from asked) union {' union '.join(neighbours)}"
    )
    oldest_us = _oldest_wanted_us(connection)
    if oldest_us is None:
        return EVENTS_SCHEMA.empty_table()
    connection.execute(
        f"insert into wanted select event_id, landed_at from {holding('retracts', 'select event_id from wanted')} "
        f"where event_type = 'retraction' and {_landed(oldest_us)} and retracts in (select event_id from wanted)"
    )
    ids = "select event_id from wanted"
    recent, arrivals = _landed(_oldest_wanted_us(connection) or 0), holding("event_id", ids)
    landings = connection.execute(
        f"select distinct epoch_us(landed_at) from {arrivals} where {recent} and event_id in ({ids})"
    ).fetchall()
    rows = f"select {', '.join(EVENTS_SCHEMA.names)} from {arrivals} where event_id in ({ids})"
    if len(landings) <= _FEW:  # then the other columns are read of few files
        rows += f" and landed_at in ({', '.join(f'make_timestamptz({landed_us})' for (landed_us,) in landings)})"
    return connection.execute(rows).to_arrow_table().cast(EVENTS_SCHEMA)


def _oldest_wanted_us(connection: duckdb.DuckDBPyConnection) -> int | None:
    """Before this instant nothing decides about what is wanted; None where nothing is."""
    (oldest_us,) = connection.execute("select min(epoch_us(landed_at)) from wanted").fetchall()[0]
    return None if oldest_us is None else oldest_us - DUPLICATE_MEMORY_US


def _landed(from_us: int, until_us: int | None = None) -> str:
    bound = f"landed_at >= make_timestamptz({max(from_us, 0)})"
    return bound if until_us is None else f"{bound} and landed_at <= make_timestamptz({max(until_us, 0)})"


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
    """The history of a running server. One thread asks; any may `prepare`."""

    def __init__(self, lake: Lake, log: Log):
        self._lake, self._log = lake, log
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._index, self._files = EventIndex(Home(lake.folder.parent).online / INDEX_FOLDER), DataFiles()
        self._lock = threading.Lock()
        self.is_prepared = False
        """Whether `prepare` has run."""

    def around(self, event_ids: Iterable[str], keys: Sequence[tuple[str, ...]], position: Position, since_us: int) -> pa.Table:
        if self._connection is None:
            self._connection = duckdb_connection()
            self._connection.execute("set parquet_metadata_cache = true; set threads = 1")  # files of the lake never change
        connection = self._connection
        table = self._lake.table(EVENTS)
        landed = position_of(table)
        in_lake = tuple(min(pair) for pair in zip(landed, position, strict=True))
        # tables of DuckDB's own: its joins push filters down that scans of Arrow tables do not know
        for name, rows in (("asked", asked(event_ids)), ("in_log", self._not_landed(landed, position))):
            connection.register("given", rows)
            connection.execute(f"create or replace temp table {name} as select * from given")
            connection.unregister("given")
        names = ", ".join(EVENTS_SCHEMA.names)
        indexed = self._follow(table)

        def history(landed: str | None) -> str:
            in_log = f"select {names} from in_log where {below_sql(position)}"
            if landed is None:
                return in_log
            since = f"landed_at >= make_timestamptz({oldest_landing_us(since_us)})"
            return f"select {names} from ({landed}) as landed where {since} and ({below_sql(in_lake)}) union all {in_log}"

        def holding(column: str, values: str) -> str:
            wanted = connection.execute(sought(column, values)).fetchnumpy()["sought"]
            return f"({history(parquet_sql(self._index.holding(column, wanted)))}) as history"

        if indexed:
            return around(connection, keys, holding)
        connection.execute(f"create or replace temp view history as {history(self._lake.view_sql(EVENTS))}")
        return around(connection, keys)

    def prepare(self) -> None:
        """Takes the lake's newest files into the index, which the next question then need not."""
        self.is_prepared = True
        try:
            if self._lake.exists(EVENTS):
                self._follow(self._lake.table(EVENTS))
        except duckdb.Error as error:  # of a file that was compacted away meanwhile, say
            _LOG.warning("the index of events is made when it is needed: %s", error)

    def _follow(self, table: Table) -> bool:
        """Whether the index knows the files of this table, and they are the table."""
        with self._lock:
            paths = self._files.of(table)
            if paths is None or (paths and parquet_sql(paths) is None):
                return False
            self._index.follow(paths)
            return True

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
