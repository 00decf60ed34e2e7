"""From what a client sends to a row of the event log: checks one event, fills what may be absent, normalises instants.

Knows nothing of storage. A row is a tuple in the order of `ROW_FIELDS`; instants are microseconds since 1970-01-01 UTC.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pyarrow as pa

from warehouse.errors import HeadraceError
from warehouse.events import EVENTS_SCHEMA, HEARTBEAT, RETRACTION

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LOG_FIELDS = ("landed_at", "log_partition", "log_offset", "landing")
"""Stamped by the log; what a client sends under these names is refused."""
ROW_FIELDS = tuple(field.name for field in EVENTS_SCHEMA if field.name not in LOG_FIELDS)
REQUIRED = ("event_id", "event_type", "event_ts")
_LARGEST_US = 253_402_300_799_999_999  # 9999-12-31: beyond it Python, Arrow and DuckDB no longer agree


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
    if event["event_type"] == HEARTBEAT:
        raise ValueError(f"event_type {HEARTBEAT!r} is written by the log alone")
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
