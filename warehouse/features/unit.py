"""Unit tests that a user writes beside a feature group: given events, a request time, expected values.

`meta.features.tests` of the group's model. `headrace features check --unit` runs them by the SQL that dbt builds with and by
the arrays of `compute`; both must give what is expected. Nothing of the lake is read or written.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import yaml

from warehouse.connections import plain_connection
from warehouse.errors import HeadraceError
from warehouse.events import EVENTS_SCHEMA, TIMESTAMP
from warehouse.features import render
from warehouse.features.compute_engine import Engine
from warehouse.features.compute_plan import plan
from warehouse.features.compute_source import RETRACTIONS, SHADOWED, STAGING, Relations
from warehouse.features.compute_spine import REQUEST_TS, Spine
from warehouse.features.declarations import FeatureGroup, LineLoader
from warehouse.features.generated import attribute_tables
from warehouse.features.verify import create_tables
from warehouse.home import REPOSITORY

STAGED = f"{STAGING}.stg_engagements"
_RETRACTED = f"{STAGING}.stg_retracted_events"
_EXAMPLE = (
    "{name: a_click_counts, events: [{event_type: click, note_id: n1, event_ts: '2026-01-01T10:01:00Z'}], "
    "request: {note_id: n1, request_ts: '2026-01-01T10:06:00Z'}, expect: {note_num_clicks_1h: 1}}"
)


@dataclass(frozen=True)
class UnitTest:
    """One test of a group. events: as `lake.events` names its columns, others become properties. request: the keys and
    `request_ts`; K = T. expect: feature → value, NULL as null."""

    name: str
    group: str
    events: tuple[Mapping[str, Any], ...]
    request: Mapping[str, Any]
    expect: Mapping[str, Any]
    source: str
    tables: Mapping[str, tuple[Mapping[str, Any], ...]]
    """Of tables that add to events, by `namespace.table`: the rows."""


def load_unit_tests(groups: Mapping[str, FeatureGroup], project_dir: Path | None = None) -> list[UnitTest]:
    """The tests of all groups, in the order of the files. Raises HeadraceError naming file, line and remedy."""
    root = project_dir or REPOSITORY
    tests = []
    for path in sorted((root / "warehouse" / "models").rglob("*.yml")):
        for model in (yaml.load(path.read_text(), Loader=LineLoader) or {}).get("models") or []:
            if (group := groups.get(model["name"])) is not None:
                declared = model["config"]["meta"]["features"].get("tests") or []
                tests += [_unit_test(entry, group, str(path.relative_to(root))) for entry in declared]
    return tests


def failures(test: UnitTest, group: FeatureGroup) -> list[str]:
    """One sentence per value that is not as expected; empty when the test passes."""
    told: dict[tuple[str, str], list[str]] = {}
    with plain_connection() as connection:
        relations = _build(connection, test, group)
        keys = {name: [str(value)] for name, value in test.request.items() if name != REQUEST_TS}
        at = pa.array([test.request[REQUEST_TS]], pa.int64()).cast(TIMESTAMP)
        spine = Spine(pa.table({**keys, REQUEST_TS: at}), f"{test.source}: test {test.name}: request")
        what = plan({group.name: group}, spine.schema.names, list(test.expect))
        spine.check_columns(what.keys, None, ())
        for execution, arrays in (("batch SQL", False), ("compute", True)):
            engine = Engine(connection, {group.name: relations}, what, spine.span(what.keys, None), arrays=arrays)
            found = [engine.columns(spine.reads(chunk, what.keys, None)) for chunk in spine.chunks()]
            for name, expected in test.expect.items():
                got = found[0][name][0].as_py()
                if not _same(got, expected):
                    told[name, repr(got)] = [*told.get((name, repr(got)), []), execution]
    return [
        f"{test.source}: test {test.name}: {name} is {got} by {' and '.join(by)}, expected {test.expect[name]!r}"
        for (name, got), by in told.items()
    ]


def _build(connection: duckdb.DuckDBPyConnection, test: UnitTest, group: FeatureGroup) -> Relations:
    connection.register("given", pa.Table.from_pylist(_landed(test.events), schema=EVENTS_SCHEMA))
    for schema in (STAGING, "features"):
        connection.execute(f"create schema {schema}")
    create_tables(connection, attribute_tables(group.attributes, test.tables))
    relations = Relations.of(group)
    for name, sql in (
        (STAGED, lambda: render.staging_sql("given", attributes=group.attributes)),
        (SHADOWED, lambda: render.shadowed_sql("given", group.attributes)),
        (RETRACTIONS, lambda: render.retractions_sql("given")),
        (_RETRACTED, lambda: render.retracted_sql(STAGED, RETRACTIONS)),
        (relations.blocks, lambda: render.block_sql(group, STAGED, _RETRACTED)),
        (relations.hours, lambda: render.roll_up_sql(group, relations.blocks, 60)),
        (relations.days, lambda: render.roll_up_sql(group, relations.hours, 1440)),
    ):
        connection.execute(f"create table {name} as {sql()}")
    return relations


def _landed(events: tuple[Mapping[str, Any], ...]) -> list[dict[str, Any]]:
    """Rows of `lake.events` in the order of landing, with what a test leaves out filled in."""
    rows: list[dict[str, Any]] = []
    for place, event in enumerate(events):
        extra = {name: value for name, value in event.items() if name not in EVENTS_SCHEMA.names}
        row = {name: event.get(name) for name in EVENTS_SCHEMA.names}
        row |= {"event_id": event.get("event_id") or f"event {place + 1}", "landing": "log"}
        row |= {"landed_at": event.get("landed_at", event["event_ts"]), "log_partition": event.get("log_partition", 0)}
        rows.append(row | ({"properties": json.dumps(extra)} if extra else {}))
    rows.sort(key=lambda row: row["landed_at"])
    offsets: dict[int, int] = {}
    for row in rows:
        row["log_offset"] = offsets[row["log_partition"]] = offsets.get(row["log_partition"], -1) + 1
    return rows


def _unit_test(entry: Any, group: FeatureGroup, file: str) -> UnitTest:
    if not isinstance(entry, dict) or not {"name", "request", "expect"} <= set(entry):
        raise HeadraceError(f"{group.source}: a test has a name, events, a request and expect, such as {_EXAMPLE}")
    source = f"{file}:{entry['__line__']}"

    def fail(problem: str) -> HeadraceError:
        return HeadraceError(f"{source}: test {entry['name']}: {problem}")

    if unknown := sorted(set(entry) - {"name", "events", "tables", "request", "expect", "description", "__line__"}):
        raise fail(f"unknown settings {unknown}; a test has name, events, tables, request, expect, description")
    expect = _plain(entry["expect"])
    known = {*group.feature_names, *group.sequence_names}
    if not expect or set(expect) - known:
        raise fail(
            f"expect names {', '.join(sorted(set(expect) - known)) or 'nothing'}; {group.name} has {', '.join(sorted(known))}"
        )
    request = _plain(entry["request"])
    if REQUEST_TS not in request:
        raise fail(f"request needs {REQUEST_TS}, a time with a zone")
    events = [_plain(event) for event in entry.get("events") or []]
    for event in events:
        if "event_type" not in event or "event_ts" not in event:
            raise fail(f"an event needs event_type and event_ts, got {event}")
        event |= {name: _instant(event[name], name, fail) for name in ("event_ts", "landed_at") if name in event}
    request[REQUEST_TS] = _instant(request[REQUEST_TS], REQUEST_TS, fail)
    tables = _given_tables(_plain(entry.get("tables") or {}), group, fail)
    return UnitTest(entry["name"], group.name, tuple(events), request, expect, source, tables)


def _given_tables(
    given: Mapping[str, Any], group: FeatureGroup, fail: Callable[[str], HeadraceError]
) -> dict[str, tuple[Mapping[str, Any], ...]]:
    columns: dict[str, set[str]] = {}
    times: dict[str, set[str]] = {}
    for entry in group.attributes:
        columns.setdefault(entry.relation, set()).update(entry.table_columns)
        times.setdefault(entry.relation, set()).update((entry.valid_from, entry.available_at))
    tables: dict[str, tuple[Mapping[str, Any], ...]] = {}
    for relation, rows in given.items():
        if relation not in columns:
            raise fail(f"tables names {relation}; events take attributes from {', '.join(sorted(columns)) or 'no table'}")
        read = [_plain(row) for row in rows or []]
        for row in read:
            if unknown := sorted(set(row) - columns[relation]):
                raise fail(f"{relation}: {', '.join(unknown)} is not read; {', '.join(sorted(columns[relation]))} are")
            row |= {name: _instant(row[name], name, fail) for name in times[relation] if row.get(name) is not None}
        tables[relation] = tuple(read)
    return tables


def _plain(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != "__line__"}


def _instant(value: Any, name: str, fail: Any) -> int:
    """Microseconds of an ISO 8601 time with a zone."""
    try:
        instant = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    except ValueError:
        instant = None
    if instant is None or instant.tzinfo is None or not isinstance(value, str):
        raise fail(f"{name} {value!r} is no time with a zone in quotes; write '2026-01-01T10:00:00Z'")
    since = instant - datetime.fromtimestamp(0, UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _same(got: Any, expected: Any) -> bool:
    if isinstance(expected, float) and isinstance(got, int | float):
        return math.isclose(got, expected, rel_tol=1e-9, abs_tol=1e-12)
    return got == expected


def run_unit_tests(groups: Mapping[str, FeatureGroup], project_dir: Path | None = None) -> Iterator[tuple[UnitTest, list[str]]]:
    """(test, its failures) of every declared test."""
    for test in load_unit_tests(groups, project_dir):
        yield test, failures(test, groups[test.group])
