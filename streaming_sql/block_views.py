"""What the views of `models/streaming_sql` hold of closed ticks, as block rows: of a group, or of one reader in one statement.

Rows of a closed tick never change, so a reader may take what the ticks since its last one brought and be none the wiser. Knows
nothing of stores.
"""

import threading
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from streaming_sql.micro_batch import MicroBatch
from streaming_sql.postgres_reader import PostgresReader
from streaming_sql.records import EPOCH, to_us
from warehouse.errors import HeadraceError
from warehouse.features.declarations import FeatureGroup
from warehouse.features.render import standing_sql

READER = "user_id"
_TICK = "closed_tick"
_BEFORE = ("of_view", _TICK)
"""What stands before the columns of groups in a statement that reads several."""


class BlockViews:
    """Statements over the views of these groups, and what their answers are as Arrow rows. Thread-safe."""

    def __init__(self, groups: Mapping[str, FeatureGroup]):
        self._groups = dict(groups)
        batch = MicroBatch(groups)
        self._schemas = {name: rows.schema for name, rows in batch.blocks(batch.nothing).items()}
        self._connection = duckdb.connect(config={"threads": 1})
        self._connection.execute("set TimeZone = 'UTC'")
        self._lock = threading.Lock()

    def columns(self, name: str) -> dict[str, str]:
        """The columns of a group's view and their types there."""
        return {field.name: _sql_type(field.type) for field in self._schemas[name]}

    def closed_tick(self, reader: PostgresReader) -> int:
        """The cluster's closed tick, microseconds; 0 while a partition is silent. Raises HeadraceError as `reader` does."""
        found = reader.rows(f"select {_TICK} from {_TICK}")
        return to_us(found[0][_TICK]) if found and found[0][_TICK] is not None else 0

    def rows(self, reader: PostgresReader, name: str, after_us: int, tick_us: int, from_us: int) -> pa.Table:
        """The block rows from from_us on that the ticks after after_us and up to tick_us bring, as they stand at tick_us."""
        columns = ", ".join(self._schemas[name].names)
        _, found = reader.fetch(
            f"select {columns} from {name} where known_at > %s and known_at <= %s and block_start >= %s",
            [_instant(after_us), _instant(tick_us), _instant(from_us)],
        )
        return self._standing(name, found, tick_us)

    def rows_of(
        self, reader: PostgresReader, user_id: str, after_us: int, tick_us: int, from_us: Mapping[str, int]
    ) -> dict[str, pa.Table]:
        """The same of the rows that begin with one reader, of the groups in from_us by one statement that reads the tick, too:
        so that all come from one checkpoint. Raises HeadraceError if the cluster has not closed tick_us."""
        names = tuple(from_us)
        given: list[Any] = []
        for name in names:
            given += [user_id, _instant(after_us), _instant(tick_us), _instant(from_us[name])]
        found: dict[str, list[tuple[Any, ...]]] = {name: [] for name in (_TICK, *names)}
        for row in reader.fetch(self.of_reader_sql(names), given)[1]:
            found[row[0]].append(row)
        closed_us = max((to_us(tick) for _, tick, *_ in found[_TICK] if tick is not None), default=0)
        if closed_us < tick_us:
            raise HeadraceError(f"the cluster's closed tick is {_instant(closed_us)}, before {_instant(tick_us)} of the store")
        rows, at = {}, len(_BEFORE)
        for name in names:
            end = at + len(self._schemas[name])
            rows[name] = self._standing(name, [row[at:end] for row in found[name]], tick_us)
            at = end
        return rows

    @lru_cache(maxsize=8)  # noqa: B019
    def of_reader_sql(self, names: tuple[str, ...]) -> str:
        """The statement of `rows_of`: it takes of each group the reader, the ticks after and up to, the first block."""
        view, tick = _BEFORE
        parts = [f"select '{_TICK}' as {view}, {_TICK} as {tick}, {self._nulls(names)} from {_TICK}"]
        parts += [
            f"select '{name}' as {view}, cast(null as timestamptz) as {tick}, {self._nulls(names, name)} from {name} "
            f"where {READER} = %s and known_at > %s and known_at <= %s and block_start >= %s"
            for name in names
        ]
        return " union all ".join(parts)

    def _nulls(self, names: Sequence[str], own: str | None = None) -> str:
        """The columns of all these groups, NULL but for those of `own`."""
        return ", ".join(
            f"{field.name if name == own else f'cast(null as {_sql_type(field.type)})'} as {name}__{field.name}"
            for name in names
            for field in self._schemas[name]
        )

    def _standing(self, name: str, found: Sequence[tuple[Any, ...]], tick_us: int) -> pa.Table:
        schema = self._schemas[name]
        columns = zip(*found, strict=True) if found else [()] * len(schema)
        try:
            table = pa.table([_column(field.type, values) for field, values in zip(schema, columns, strict=True)], schema)
        except (KeyError, TypeError, ValueError) as error:  # Arrow's are among them
            raise HeadraceError(f"the view {name} holds other rows than blocks of these declarations: {error}") from error
        if not pc.any(table["is_rebuilt"]).as_py():  # then none replaces another
            return table
        with self._lock:
            self._connection.register("fetched", table)
            sql = standing_sql(self._groups[name], "fetched", f"make_timestamptz({tick_us})")
            return self._connection.execute(sql).to_arrow_table()


def _instant(instant_us: int) -> datetime:
    return EPOCH + timedelta(microseconds=instant_us)


def _sql_type(kind: pa.DataType) -> str:
    """Of the views' columns: lists are arrays of JSON there."""
    if pa.types.is_list(kind):
        return "jsonb[]"
    names = {pa.int64(): "bigint", pa.float64(): "double precision", pa.string(): "varchar", pa.bool_(): "boolean"}
    return "timestamptz" if pa.types.is_timestamp(kind) else names[kind]


def _column(kind: pa.DataType, values: Sequence[Any]) -> pa.Array:
    """Values of PostgreSQL as a column of blocks: lists are JSON there, of events the newest first."""
    if pa.types.is_list(kind) and kind.value_type.get_field_index("event_ts") >= 0:
        values = [value and [_event(entry) for entry in reversed(value)] for value in values]
    return pa.array(values, kind)


def _event(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {**entry, "event_ts": datetime.fromisoformat(entry["event_ts"])}
