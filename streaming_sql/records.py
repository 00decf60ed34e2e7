"""From what a client sends to a row of the event log: checks one event, fills what may be absent, normalises instants.

Knows nothing of storage. A row is a tuple in the order of `ROW_FIELDS`; instants are microseconds since 1970-01-01 UTC.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pyarrow as pa

from warehouse.errors import HeadraceError
from warehouse.events import DEAD_LETTER, EVENTS_SCHEMA, HEARTBEAT, RETRACTION

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LOG_FIELDS = ("landed_at", "log_partition", "log_offset", "landing")
"""Stamped by the log; what a client sends under these names is refused."""
ROW_FIELDS = tuple(field.name for field in EVENTS_SCHEMA if field.name not in LOG_FIELDS)
REQUIRED = ("event_id", "event_type", "event_ts")
_LARGEST_US = 253_402_300_799_999_999  # 9999-12-31: beyond it Python, Arrow and DuckDB no longer agree


_LONGEST_PAYLOAD = 8192


@dataclass(frozen=True)
class DeadLetter:
    """What came and is no event, and why."""

    reason: str
    payload: str


def position_after(position: Sequence[int], records: pa.Table) -> tuple[int, ...]:
    """The position behind these records of the log, of all partitions."""
    ends = records.group_by("log_partition").aggregate([("log_offset", "max")])
    after = list(position)
    for partition, offset in zip(ends["log_partition"].to_pylist(), ends["log_offset_max"].to_pylist(), strict=True):
        after[partition] = max(after[partition], offset + 1)
    return tuple(after)


def to_us(instant: Any) -> int:
    """Microseconds of an int (already microseconds), an aware datetime, or ISO-8601 text with a zone.

    Raises ValueError, saying what would be right, for anything else.
    """
    if isinstance(instant, bool) or not isinstance(instant, int | str | datetime):
        raise ValueError(f"must be microseconds, an aware datetime or ISO-8601 text, got {type(instant).__name__}")
    if isinstance(instant, str):
        try:
            instant = datetime.fromisoformat(instant.replace("Z", "+00:00"))
        except ValueError:
            raise ValueError(f"must look like 2022-05-05T16:10:00Z, got {instant[:40]!r}") from None
    if isinstance(instant, datetime):
        if instant.tzinfo is None:
            raise ValueError(f"needs a zone, got {instant.isoformat()}; write {instant.isoformat()}Z for UTC")
        instant = (instant - EPOCH) // timedelta(microseconds=1)
    if not 0 <= instant <= _LARGEST_US:
        raise ValueError(f"must be microseconds between 1970 and 9999, got {instant}")
    return instant


def _properties_text(properties: Any) -> str | None:
    if properties is None:
        return None
    if isinstance(properties, str):
        try:
            parsed = orjson.loads(properties)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"properties must be a JSON object: {error}") from None
        text = properties
    else:
        parsed = properties
        try:
            text = orjson.dumps(properties).decode()
        except TypeError as error:
            raise ValueError(f"properties must be a JSON object: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"properties must be a JSON object, got {type(parsed).__name__}")
    return text


def to_row(event: Mapping[str, Any]) -> tuple:
    """One event as a tuple of `ROW_FIELDS`. Raises ValueError with the field, the rule and what arrived."""
    unknown = set(event) - set(ROW_FIELDS)
    if unknown:
        raise ValueError(f"unknown fields {sorted(unknown)}; known are {', '.join(ROW_FIELDS)}")
    for name in REQUIRED:
        if event.get(name) in (None, ""):
            raise ValueError(f"{name} is missing")
    if event["event_type"] in (HEARTBEAT, DEAD_LETTER):
        raise ValueError(f"event_type {event['event_type']!r} is written by the log alone")
    if event["event_type"] == RETRACTION and event.get("retracts") in (None, ""):
        raise ValueError("retracts is missing: a retraction names the event_id that it takes back")
    if event["event_type"] != RETRACTION and event.get("retracts") is not None:
        raise ValueError(f"retracts belongs to a {RETRACTION}, not to a {event['event_type']}")
    row = []
    for name in ROW_FIELDS:
        value = event.get(name)
        if name == "event_ts":
            try:
                value = to_us(value)
            except ValueError as error:
                raise ValueError(f"event_ts {error}") from None
        elif name == "properties":
            value = _properties_text(value)
        elif value is not None:
            if not isinstance(value, str):
                raise ValueError(f"{name} must be a string, got {type(value).__name__}")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{name} must be valid Unicode, got a lone surrogate") from None
        row.append(value)
    return tuple(row)


def to_rows(events: Sequence[Mapping[str, Any]]) -> list[tuple]:
    """All of `events` as rows, or none: HeadraceError names the first bad one by its index."""
    rows = []
    for index, event in enumerate(events):
        try:
            rows.append(to_row(event))
        except ValueError as error:
            raise HeadraceError(f"event {index}: {error}") from None
    return rows


def to_table(rows: Sequence[tuple]) -> pa.Table:
    """Rows of all of EVENTS_SCHEMA's columns, in its order and with instants in microseconds, as an Arrow table."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(EVENTS_SCHEMA)
    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, EVENTS_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=EVENTS_SCHEMA)


def heartbeat_row(partition: int, number: int, now_us: int) -> tuple:
    """A row of ROW_FIELDS that carries the clock of an idle partition."""
    event = {"event_id": f"heartbeat-{partition}-{number}", "event_type": HEARTBEAT, "event_ts": now_us}
    return tuple(event.get(name) for name in ROW_FIELDS)


def dead_letter_row(letter: DeadLetter, now_us: int) -> tuple:
    """A row of ROW_FIELDS; the same letter again has the same id. A payload above 8 KiB is cut."""
    payload = letter.payload.encode(errors="replace")[:_LONGEST_PAYLOAD].decode(errors="replace")
    digest = hashlib.sha256(f"{letter.reason}\0{payload}".encode(errors="replace")).hexdigest()[:32]
    reason = letter.reason.encode(errors="replace").decode()
    event = {
        "event_id": f"dead-letter-{digest}",
        "event_type": DEAD_LETTER,
        "event_ts": now_us,
        "properties": orjson.dumps({"reason": reason, "payload": payload}).decode(),
    }
    return tuple(event.get(name) for name in ROW_FIELDS)


def to_message(row: tuple) -> bytes:
    """A row of ROW_FIELDS as the JSON object that travels in a Kafka message: event_ts as ISO-8601, properties as an object."""
    message = {name: value for name, value in zip(ROW_FIELDS, row, strict=True) if value is not None}
    message["event_ts"] = (EPOCH + timedelta(microseconds=message["event_ts"])).isoformat()
    if "properties" in message:
        message["properties"] = orjson.Fragment(message["properties"])
    return orjson.dumps(message)


def from_message(message: bytes | None, landed_at: int, partition: int, offset: int) -> tuple:
    """A row of EVENTS_SCHEMA. What is no event of ours becomes a dead letter with the reason, so that it stops nobody."""
    try:
        row = _row_of_message(message)
    except ValueError as error:
        letter = DeadLetter(f"message is no event: {error}", (message or b"").decode(errors="replace"))
        row = dead_letter_row(letter, landed_at)
    values = dict(zip(ROW_FIELDS, row, strict=True))
    values |= {"landed_at": landed_at, "log_partition": partition, "log_offset": offset, "landing": "log"}
    return tuple(values[name] for name in EVENTS_SCHEMA.names)


def _row_of_message(message: bytes | None) -> tuple:
    if message is None:
        raise ValueError("it is empty")
    event = orjson.loads(message)
    if not isinstance(event, dict):
        raise ValueError(f"it must be a JSON object, got {type(event).__name__}")
    if event.get("event_type") not in (HEARTBEAT, DEAD_LETTER):
        return to_row(event)
    if not isinstance(event.get("event_id"), str):
        raise ValueError("event_id must be a string")
    return tuple(
        to_us(event.get(name))
        if name == "event_ts"
        else _properties_text(event.get(name))
        if name == "properties"
        else event.get(name)
        for name in ROW_FIELDS
    )
