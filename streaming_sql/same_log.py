"""Whether a cluster's views read the event log that this process reads: the newest event that they know of a partition must be
the log's record at that place, or the lake's where the log no longer keeps it."""

from datetime import datetime
from typing import Any

import pyarrow as pa

from streaming_sql.event_log import Log
from streaming_sql.postgres_reader import PostgresReader
from streaming_sql.records import to_us
from streaming_sql.runner_report import iso
from warehouse.errors import HeadraceError
from warehouse.lake import Lake
from warehouse.landing import EVENTS

_NEWEST = "select log_partition, log_offset, event_id, landed_at from newest_arrivals order by log_partition"
_OTHER, _ADVICE = "the views read another log", "is kafka_topic of the views the topic of HEADRACE_EVENT_LOG?"


def check_same_log(reader: PostgresReader, log: Log, lake: Lake) -> None:
    """Raises HeadraceError, saying what is at the place instead, if it is another record, or how far the views are behind if
    neither log nor lake knows any of the places; as `reader` does if the views are not there. Views without events pass."""
    newest = reader.rows(_NEWEST)
    told = [_compared(log, lake, **row) for row in newest]
    if told and None not in told:
        raise HeadraceError(f"whether the views read this event log cannot be told: {'; '.join(filter(None, told))}; {_ADVICE}")


def _compared(log: Log, lake: Lake, log_partition: int, log_offset: int, event_id: str, landed_at: datetime) -> str | None:
    """None if the log or the lake has the event at its place; how far apart they are if neither has anything there."""
    place = f"offset {log_offset:,} of partition {log_partition}"
    if log_partition >= log.num_partitions:
        raise HeadraceError(f"{_OTHER}: they know {place}, this one has {log.num_partitions} partitions; {_ADVICE}")
    offset, end = log.offset_of(log_partition, log_offset), log.end()
    if offset >= end[log_partition]:
        raise HeadraceError(f"{_OTHER}: they know {place}, this one ends at {end[log_partition]:,}; {_ADVICE}")
    kept_from = log.start()[log_partition]
    if offset >= kept_from:
        position = tuple(offset if partition == log_partition else last for partition, last in enumerate(end))
        records = log.read(position, 1)
    else:
        records = _landed(lake, log_partition, offset, event_id)
    if not records.num_rows:
        return (
            f"the newest event that they know is {place}, which landed at {iso(to_us(landed_at))}; the log keeps what is "
            f"{kept_from - offset:,} records later, and the lake has no such event"
        )
    (found,) = records.select(["event_id", "landed_at"]).to_pylist()
    if found["event_id"] != event_id or found["landed_at"] < landed_at:  # the log's is the running maximum
        raise HeadraceError(
            f"{_OTHER}: at {place} they know {_said(event_id, landed_at)}, here it is {_said(**found)}; {_ADVICE}"
        )
    return None


def _landed(lake: Lake, partition: int, offset: int, event_id: str) -> pa.Table:
    """The event, which imports since may have moved, else what is at the place."""
    if not lake.exists(EVENTS):
        return pa.table({"event_id": []})
    with lake.duckdb() as connection:
        return connection.execute(
            f"select event_id, landed_at from {EVENTS} where log_partition = $1 and (event_id = $3 or log_offset = $2) "
            "order by event_id <> $3, landed_at desc limit 1",
            [partition, offset, event_id],
        ).to_arrow_table()


def _said(event_id: Any, landed_at: datetime) -> str:
    return f"event {event_id!r} of {iso(to_us(landed_at))}"
