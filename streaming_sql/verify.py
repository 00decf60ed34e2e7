"""The live path as one more execution of `headrace features verify`: generated events through feed and store, and what views
of it answer, each at its own tick and position."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from random import Random
from typing import Any, cast

import duckdb
import numpy as np
import pyarrow as pa

from streaming_sql.event_log import Position
from streaming_sql.feed import Feed
from streaming_sql.history import around, asked, below_sql, oldest_landing_us
from streaming_sql.key_index import Key
from streaming_sql.online_store import OnlineStore, StoreView
from warehouse.connections import duckdb_connection
from warehouse.events import EVENTS_SCHEMA, TIMESTAMP
from warehouse.features.declarations import FeatureGroup
from warehouse.features.generated import attributes_of
from warehouse.features.oracle import Read
from warehouse.time_algebra import FIVE_MINUTES_US, HOUR_US, MINUTE_US, SECOND_US, floor_5m

EXECUTION = "live store"
PIECES = 12
"""In how many pieces the two partitions are read, about."""
_SILENT_US = (0, 0, 1, SECOND_US, 7 * MINUTE_US, HOUR_US)


def live_answers(
    groups: Mapping[str, FeatureGroup],
    rows: Sequence[Mapping[str, Any]],
    random: Random,
    tables: Mapping[str, pa.Table] | None = None,
    pieces: int = PIECES,
    reads: int = 2,
) -> Iterator[tuple[str, Read, dict[str, Any]]]:
    """(group, question, answer) of views between the pieces in which a feed takes the rows, `reads` of each group and view.

    rows: of `lake.events`, instants in microseconds, offsets from 0 in each of two partitions, in order of landing. One
    partition may be read far ahead of the other. tables: those that add to events, by `namespace.table`.
    """
    history = _Taken()
    store = OnlineStore(groups)
    feed = Feed(store, groups, store.position, history, _Tables(tables or {}))
    seen: list[Mapping[str, Any]] = []
    found = (
        {
            one.name: tables[entry.relation][one.column].to_pylist()
            for entry in attributes_of(groups.values())
            for one in entry.columns
        }
        if tables
        else {}
    )
    for piece in _delivered(rows, random, pieces):
        history.add(_as_table(piece))
        feed.take(_as_table(piece))
        seen += piece
        view = store.view()
        newest_us = max(view.tick_us, *(row["landed_at"] for row in seen))
        for group in groups.values():
            for _ in range(reads):
                t_us = newest_us + random.choice(_SILENT_US)
                if random.random() < 0.5:
                    t_us = max(random.choice(seen)["event_ts"] + random.choice((0, 1)), view.tick_us)
                if random.random() < 0.2:
                    t_us = floor_5m(t_us) + FIVE_MINUTES_US
                event = random.choice(seen)
                parts = ((event.get(column), found.get(column, [])) for column in group.entity_keys)
                key = tuple(_part(random, own, others) if random.random() < 0.95 else "nobody" for own, others in parts)
                read = Read(key, t_us, view.tick_us, view.tick_us, view.position)
                yield group.name, read, answer(view, group, read)


def _part(random: Random, own: Any, others: Sequence[Any]) -> Any:
    """What an event has of a key column, or what a table might give it."""
    return random.choice(others) if own is None and others else own


def answer(view: StoreView, group: FeatureGroup, read: Read) -> dict[str, Any]:
    """What the view says to a read of one key, in the shapes of SQL: None for NULL, maps as pairs."""
    matrix = view.assemble(group.name, [cast(Key, read.key)], read.request_us)  # a NULL is looked up like an unknown key
    numbers = zip(matrix.names, matrix.values[0].tolist(), strict=True)
    return {
        **{name: None if np.isnan(value) else value for name, value in numbers},
        **{name: lists[0] for name, lists in matrix.sequences.items()},
        **{name: list(maps[0].items()) for name, maps in matrix.maps.items()},
    }


def _delivered(rows: Sequence[Mapping[str, Any]], random: Random, pieces: int) -> Iterator[list[Mapping[str, Any]]]:
    waiting = [[row for row in rows if row["log_partition"] == partition] for partition in (0, 1)]
    while any(waiting):
        partition = random.randrange(2) if all(waiting) else int(not waiting[0])
        size = random.randint(1, max(1, 2 * len(rows) // pieces))
        yield waiting[partition][:size]
        waiting[partition] = waiting[partition][size:]


class _Tables:
    """Tables as they are in the end: what a tick may not know yet must not show."""

    def __init__(self, tables: Mapping[str, pa.Table]):
        self._tables = tables

    def changed(self) -> Iterator[tuple[str, pa.Table]]:
        yield from self._tables.items()


class _Taken:
    """The history of rows in memory: what lake and log are to a running server."""

    def __init__(self) -> None:
        self._parts: list[pa.Table] = [EVENTS_SCHEMA.empty_table()]
        self._connection: duckdb.DuckDBPyConnection | None = None

    def add(self, records: pa.Table) -> None:
        self._parts.append(records)

    def around(self, event_ids: Iterable[str], keys: Sequence[tuple[str, ...]], position: Position, since_us: int) -> pa.Table:
        if self._connection is None:
            self._connection = duckdb_connection()
        connection = self._connection
        for name, table in (("taken", pa.concat_tables(self._parts)), ("ids", asked(event_ids))):
            connection.register(name, table)
        connection.execute("create or replace temp table asked as select * from ids")
        connection.execute(
            f"create or replace temp table history as select * from taken "
            f"where landed_at >= make_timestamptz({oldest_landing_us(since_us)}) and ({below_sql(position)})"
        )
        return around(connection, keys)


def _as_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    columns = [
        pa.array([row[field.name] for row in rows], pa.int64()).cast(TIMESTAMP)
        if pa.types.is_timestamp(field.type)
        else pa.array([row[field.name] for row in rows], field.type)
        for field in EVENTS_SCHEMA
    ]
    return pa.Table.from_arrays(columns, schema=EVENTS_SCHEMA)
