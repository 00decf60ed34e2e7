"""What light events are with their attributes, written as plainly as possible: every execution is judged by it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from warehouse.features.attributes import Attributes
from warehouse.time_algebra import arrival_tick, newest_tick

Rows = Sequence[Mapping[str, Any]]


def hydrated(
    events: Iterable[Mapping[str, Any]], attributes: Sequence[Attributes], tables: Mapping[str, Rows]
) -> list[dict[str, Any]]:
    """The events with the columns that tables fill, as known when each landed.

    events: rows of `lake.events`, times in microseconds. tables: `namespace.table` → its rows, times in microseconds.
    """
    return [_hydrated(dict(event), attributes, tables) for event in events]


def _hydrated(event: dict[str, Any], attributes: Sequence[Attributes], tables: Mapping[str, Rows]) -> dict[str, Any]:
    for entry in attributes:
        row = _newest(event, entry, tables[entry.relation])
        for one in entry.columns:
            if event.get(one.name) is None or not one.is_carried:
                event[one.name] = None if row is None else row[one.column]
    return event


def _newest(event: Mapping[str, Any], entry: Attributes, rows: Rows) -> Mapping[str, Any] | None:
    """Of the key's rows that are valid by the event's time and were known when it landed, the newest: by valid_from, then
    available_at, then the values in declared order (NULL first)."""
    candidates = []
    for row in rows:
        valid_from = row[entry.valid_from]
        if valid_from is None or any(event[name] is None or event[name] != row[column] for name, column in entry.keys):
            continue
        available_at = valid_from if row[entry.available_at] is None else row[entry.available_at]
        if valid_from <= event["event_ts"] and arrival_tick(available_at) <= newest_tick(event["landed_at"]):
            values = [row[one.column] for one in entry.columns]
            ranks = tuple((value is not None, value.encode() if isinstance(value, str) else value or 0) for value in values)
            candidates.append(((valid_from, available_at, *ranks), row))
    return max(candidates, key=lambda one: one[0])[1] if candidates else None
