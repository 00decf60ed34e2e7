"""The online store of a server beside a RisingWave cluster: its views' blocks, tick by tick, over PostgreSQL's protocol.

Rows of a closed tick never change, so a refresh reads the tick, then of each group what the ticks since the last one brought. A
cluster that is away leaves the store where it is. Event-fresh measures are read as of the tick: the views hold no head.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import duckdb
import pyarrow as pa

from streaming_sql.micro_batch import MicroBatch
from streaming_sql.online_store import OnlineStore
from streaming_sql.postgres_reader import PostgresReader
from streaming_sql.records import EPOCH, to_us
from warehouse.features.declarations import FeatureGroup
from warehouse.features.render import standing_sql


class Replica:
    """`store` answers like the embedded runner's. One thread refreshes."""

    def __init__(self, reader: PostgresReader, groups: Mapping[str, FeatureGroup]):
        self._reader, self._groups = reader, dict(groups)
        self.store = OnlineStore(groups)
        batch = MicroBatch(groups)
        self._schemas = {name: rows.schema for name, rows in batch.blocks(batch.nothing).items()}
        self._connection = duckdb.connect(config={"threads": 1})
        self._connection.execute("set TimeZone = 'UTC'")

    def refresh(self) -> bool:
        """Moves to the cluster's closed tick; whether there was a newer one. Raises HeadraceError if the cluster does not
        answer; the store is then as before, whole."""
        found = self._reader.rows("select closed_tick from closed_tick")
        if not found or found[0]["closed_tick"] is None:
            return False
        tick_us, after_us = to_us(found[0]["closed_tick"]), self.store.tick_us
        if tick_us <= after_us:
            return False
        blocks = {name: self._rows(name, after_us, tick_us) for name in self._groups}
        self.store.advance(self.store.position, {}, tick_us=tick_us, blocks=blocks)
        return True

    def _rows(self, name: str, after_us: int, tick_us: int) -> pa.Table:
        """The block rows that the ticks after after_us and up to tick_us bring, as they stand at tick_us."""
        schema, from_us = self._schemas[name], self.store.plans[name].keep_from_us(tick_us)
        found = self._reader.rows(
            f"select {', '.join(schema.names)} from {name} where known_at > %s and known_at <= %s and block_start >= %s",
            [EPOCH + timedelta(microseconds=instant) for instant in (after_us, tick_us, from_us)],
        )
        table = pa.Table.from_pylist(
            [{field.name: _as(field.type, row[field.name]) for field in schema} for row in found], schema
        )
        self._connection.register("fetched", table)
        sql = standing_sql(self._groups[name], "fetched", f"make_timestamptz({tick_us})")
        return self._connection.execute(sql).to_arrow_table()


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
