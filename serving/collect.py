"""From a posted body to events of the log: each event is checked on its own, so one bad event does not take the others down."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from serving.catalogue import Catalogue
from serving.http import sentence, validation_errors
from serving.wire import EventIn
from streaming_sql.records import DeadLetter, to_row, to_us
from warehouse.time_algebra import DAY_US, DUPLICATE_MEMORY_US, FURTHEST_AHEAD_US, MINUTE_US

NDJSON = ("application/x-ndjson", "application/ndjson", "application/jsonl")
MOST_EVENTS = 1000
MOST_PROPERTIES_BYTES = 8192


@dataclass(frozen=True)
class Checked:
    """One event of a body: `row` for the log, or why not."""

    event_id: str | None
    row: dict[str, Any] | None
    error: str | None
    sent: Any
    """What came; text where it is no JSON."""

    def letter(self) -> DeadLetter:
        """A refused event, to be kept with its reason."""
        assert self.error is not None
        return DeadLetter(self.error, self.sent if isinstance(self.sent, str) else json.dumps(self.sent, ensure_ascii=False))


@dataclass(frozen=True)
class NoJson:
    """A line that does not parse: `error` says why, `text` is what came."""

    error: str
    text: str


def parse(body: bytes, content_type: str) -> list[Any]:
    """The events of a posted body, not yet checked: NDJSON where the content type says so, one `NoJson` for each line that does
    not parse; else one JSON object, or `{"events": [...]}`. Raises ValueError, saying what would be right, for a body that
    holds no events at all or too many."""
    if content_type.partition(";")[0].strip().lower() not in NDJSON:
        return events_of(_loads(body))
    lines = [line for line in body.splitlines() if line.strip()]
    if not 1 <= len(lines) <= MOST_EVENTS:
        raise ValueError(f"NDJSON must hold 1 to {MOST_EVENTS} lines, one event each, got {len(lines)}")
    return [_line(line) for line in lines]


def _loads(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ValueError(f"the body must be JSON: {why}") from None


def _line(line: bytes) -> Any:
    try:
        return _loads(line)
    except ValueError as error:
        return NoJson(str(error).replace("the body", "the line", 1), line.decode(errors="replace"))


def events_of(body: Any) -> list[Any]:
    """The events of a body: the object itself, or the list under `events`. Raises ValueError with what would be right."""
    if not isinstance(body, dict):
        raise ValueError(f'the body must be one event or {{"events": [...]}}, got a JSON {_json_type(body)}')
    if "events" not in body:
        return [body]
    if extra := sorted(set(body) - {"events"}):
        raise ValueError(f"beside events the body holds {', '.join(map(repr, extra[:5]))}; send one event, or only events")
    events = body["events"]
    if not isinstance(events, list) or not 1 <= len(events) <= MOST_EVENTS:
        raise ValueError(f"events must be a list of 1 to {MOST_EVENTS} events")
    return events


def check(events: Sequence[Any], catalogue: Catalogue, now_us: int) -> list[Checked]:
    """Each event as a row for the log, in order. now_us: the server's clock, for events that bring no time and for the limits
    on late and early ones."""
    return [_check_one(event, catalogue, now_us) for event in events]


def _check_one(event: Any, catalogue: Catalogue, now_us: int) -> Checked:
    if isinstance(event, NoJson):
        return Checked(None, None, event.error, event.text)
    event_id = event.get("eventId") if isinstance(event, dict) else None
    event_id = event_id[:256] if isinstance(event_id, str) and event_id.isprintable() else None
    try:
        parsed = EventIn.model_validate(event)
        row = _row(parsed, catalogue, now_us)
        to_row(row)  # what the log would refuse is refused here, where it takes nobody else down
        return Checked(parsed.event_id, row, None, event)
    except ValidationError as error:
        return Checked(event_id, None, sentence(validation_errors(error.errors(include_url=False))), event)
    except ValueError as error:
        return Checked(event_id, None, str(error), event)


def _row(event: EventIn, catalogue: Catalogue, now_us: int) -> dict[str, Any]:
    row = event.model_dump(exclude={"watch_ms", "event_ts", "properties"})
    row["event_ts"] = now_us if event.event_ts is None else _event_us(event.event_ts, now_us)
    if row["author_id"] is None and event.note_id is not None:
        row["author_id"] = catalogue.author_of(event.note_id)
    properties = dict(event.properties or {})
    if "watch_ms" in properties:
        raise ValueError("milliseconds played go into watchMs, beside properties")
    if event.watch_ms is not None:
        properties["watch_ms"] = event.watch_ms
    row["properties"] = _properties_text(properties) if properties else None
    return row


def _event_us(text: str, now_us: int) -> int:
    try:
        event_us = to_us(text)
    except ValueError as error:
        raise ValueError(f"eventTs {error}") from None
    if event_us - now_us > FURTHEST_AHEAD_US:
        raise ValueError(f"eventTs is more than {FURTHEST_AHEAD_US // MINUTE_US} minutes ahead of the server's clock")
    if now_us - event_us > DUPLICATE_MEMORY_US:
        raise ValueError(
            f"eventTs is more than {DUPLICATE_MEMORY_US // DAY_US} days ago; land older events with `headrace land`"
        )
    return event_us


def _properties_text(properties: dict[str, Any]) -> str:
    try:
        text = json.dumps(properties, allow_nan=False, ensure_ascii=False)
        size = len(text.encode())
    except ValueError:
        raise ValueError("properties must be JSON: no NaN, no infinity, no lone surrogates") from None
    if size > MOST_PROPERTIES_BYTES:
        raise ValueError(f"properties may take {MOST_PROPERTIES_BYTES} bytes as JSON, got {size}")
    return text


def _json_type(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), "value")
