"""What the views of `models/stream` hold of closed ticks, as block rows: of a whole group, or of one reader in one statement.

Rows of a closed tick never change, so a reader may take what the ticks since its last one brought and be none the wiser. Knows
nothing of stores.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import duckdb
import pyarrow as pa

from streaming_sql.micro_batch import MicroBatch
from streaming_sql.postgres_reader import PostgresReader
from streaming_sql.records import EPOCH, to_us
from warehouse.errors import HeadraceError
from warehouse.features.declarations import FeatureGroup
from warehouse.features.render import standing_sql

READER = "user_id"
_TICK = "closed_tick"


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
        found = reader.rows(
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
        parts = [f"select '{_TICK}' as of_view, {_TICK} as closed_tick, {self._nulls(names)} from {_TICK}"]
        given: list[Any] = []
        for name in names:
            parts.append(
                f"select '{name}' as of_view, cast(null as timestamptz) as closed_tick, {self._nulls(names, name)} from {name} "
                f"where {READER} = %s and known_at > %s and known_at <= %s and block_start >= %s"
            )
            given += [user_id, _instant(after_us), _instant(tick_us), _instant(from_us[name])]
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in (_TICK, *names)}
        for row in reader.rows(" union all ".join(parts), given):
            found[row["of_view"]].append(row)
        closed_us = max((to_us(row["closed_tick"]) for row in found[_TICK] if row["closed_tick"] is not None), default=0)
        if closed_us < tick_us:
            raise HeadraceError(f"the cluster's closed tick is {_instant(closed_us)}, before {_instant(tick_us)} of the store")
        return {name: self._standing(name, found[name], tick_us, f"{name}__") for name in names}

    def _nulls(self, names: Sequence[str], own: str | None = None) -> str:
        """The columns of all these groups, NULL but for those of `own`."""
        return ", ".join(
            f"{field.name if name == own else f'cast(null as {_sql_type(field.type)})'} as {name}__{field.name}"
            for name in names
            for field in self._schemas[name]
        )

    def _standing(self, name: str, found: Iterable[Mapping[str, Any]], tick_us: int, prefix: str = "") -> pa.Table:
        schema = self._schemas[name]
        table = pa.Table.from_pylist(
            [{field.name: _as(field.type, row[prefix + field.name]) for field in schema} for row in found], schema
        )
        if not any(table["is_rebuilt"].to_pylist()):  # then none replaces another
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


def _as(kind: pa.DataType, value: Any) -> Any:
    """A value of PostgreSQL as one of the block column's type: lists are JSON there, newest first."""
    if isinstance(value, datetime):
        return value.astimezone(UTC)
    if not isinstance(value, list):
        return value
    names = [kind.value_type.field(place).name for place in range(kind.value_type.num_fields)]
    if "event_ts" not in names:
        return value
    return [{**entry, "event_ts": datetime.fromisoformat(entry["event_ts"])} for entry in reversed(value)]
