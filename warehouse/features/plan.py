"""`headrace features plan`: what `dbt build` would do to every table of the lake, and about what it costs. Runs nothing.

A model's state is found as the build finds it: its definition against the one in the table's properties, its range from how far
the table is built to the last closed tick, and no further than what it reads. Rows, bytes and seconds are scaled from earlier
builds of the same table.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pyiceberg.table import Table as IcebergTable
from rich.console import Console
from rich.table import Table

from warehouse.builds import BUILD_SECONDS, DEFINITION, built_until_of, closed_until, known_meanings
from warehouse.features.declarations import FeatureGroup, load_groups
from warehouse.features.meanings import block_tables, changed, feature_meanings, measure_meanings
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import EVENTS
from warehouse.project import Project, table_of

EPOCH = datetime.fromtimestamp(0, UTC)
UP_TO_DATE, NEW_RANGE, NEW_DEFINITION, NOT_BUILT = "up to date", "new range", "new definition", "not built"


@dataclass(frozen=True)
class Step:
    """What a build would do to one table. start, end: the half-open range of known_at. rows, bytes and seconds are None where
    there is no previous build to estimate from. refused: the build stops here unless it is told `--full-refresh`."""

    table: str
    state: str
    start: datetime
    end: datetime
    columns_added: tuple[str, ...]
    columns_removed: tuple[str, ...]
    columns_changed: tuple[str, ...]
    refused: bool
    events: int
    rows: int | None
    bytes: int | None
    seconds: float | None


def plan_build(lake: Lake, project: Project, groups: Mapping[str, FeatureGroup], full_refresh: bool = False) -> list[Step]:
    """One step per table, in an order in which they can be built."""
    arrivals = _Arrivals(lake)
    reached: dict[str, datetime] = {}
    steps = []
    for unique_id, node in project.models():
        table = lake.table(table_of(node)) if lake.exists(table_of(node)) else None
        built = built_until_of(table) if table is not None else None
        same = table is not None and table.properties.get(DEFINITION) == project.definition_of(unique_id)
        start = built if built is not None and same and not full_refresh else EPOCH
        end = max(start, min([arrivals.closed_until, *(reached[read] for read in project.inputs(unique_id))]))
        reached[unique_id] = max(end, built or end) if same else end
        state = NOT_BUILT if built is None else NEW_DEFINITION if not same or full_refresh else NEW_RANGE
        if built is not None and start >= end:
            state = UP_TO_DATE
        steps.append(
            _step(table_of(node), table, state, start, end, _meanings(unique_id, project, groups), arrivals, full_refresh)
        )
    return steps


def _step(
    name: str,
    table: IcebergTable | None,
    state: str,
    start: datetime,
    end: datetime,
    after: Mapping[str, str],
    arrivals: "_Arrivals",
    full_refresh: bool,
) -> Step:
    before = known_meanings(table) if table is not None else {}
    rebuilt = state == NEW_DEFINITION and bool(before)
    differ = tuple(changed(before, after)) if rebuilt else ()
    events = arrivals.between(start, end) if state != UP_TO_DATE else 0
    rows, size, seconds = (0, 0, 0.0) if state == UP_TO_DATE else _estimated(table, events, arrivals)
    return Step(
        name,
        state,
        max(start, arrivals.first or start),
        end,
        tuple(column for column in after if column not in before) if rebuilt or state == NOT_BUILT else (),
        tuple(column for column in before if column not in after) if rebuilt else (),
        differ,
        bool(differ) and not full_refresh,
        events,
        rows,
        size,
        seconds,
    )


def _estimated(table: IcebergTable | None, events: int, arrivals: "_Arrivals") -> tuple[int | None, int | None, float | None]:
    """(rows, bytes, seconds) for so many more events, scaled from what the table holds and from what its builds took."""
    snapshot = table.current_snapshot() if table is not None else None
    built = built_until_of(table) if table is not None else None
    if table is None or built is None or snapshot is None or snapshot.summary is None:
        return None, None, None
    holds = arrivals.between(EPOCH, built)
    if not holds:
        return None, None, None
    total_rows = int(snapshot.summary["total-records"] or 0)
    rows = round(total_rows * events / holds)
    size = round(int(snapshot.summary["total-files-size"] or 0) * rows / total_rows) if total_rows else 0
    builds = []
    for earlier in table.metadata.snapshots:
        known = earlier.summary.additional_properties if earlier.summary else {}
        if BUILD_SECONDS in known:
            builds.append((int(known.get("added-records", 0)), float(known[BUILD_SECONDS])))
    if not builds:
        return rows, size, None
    most_rows, longest = max(builds)
    scaled = longest * rows / most_rows if most_rows else 0.0
    return rows, size, round(max(scaled, min(seconds for _, seconds in builds)), 2)


class _Arrivals:
    """How many events landed when: what every range is measured in."""

    def __init__(self, lake: Lake):
        self.closed_until, self.first, self._counts = EPOCH, None, []
        if lake.exists(EVENTS):
            with lake.duckdb() as connection:
                self.closed_until = closed_until(connection)
                self._counts = connection.execute(
                    f"select time_bucket(interval 5 minutes, landed_at), count(*) from {EVENTS} group by 1 order by 1"
                ).fetchall()
            self.first = self._counts[0][0] if self._counts else None

    def between(self, start: datetime, end: datetime) -> int:
        """Events that landed in [start, end), on the grid of ticks."""
        return sum(count for landed, count in self._counts if start <= landed < end)


def _meanings(unique_id: str, project: Project, groups: Mapping[str, FeatureGroup]) -> dict[str, str]:
    """What the model's declared columns mean now: the measures of a block table, the features that any other gathers."""
    of_blocks = {table: group for group in groups.values() for table in block_tables(group.name)}
    if own := of_blocks.get(project.nodes[unique_id]["name"]):
        return measure_meanings(own)
    meanings: dict[str, str] = {}
    for read in project.inputs(unique_id):
        name = project.nodes[read]["name"]
        if name in groups:
            meanings |= feature_meanings(groups[name])
        elif name not in of_blocks:
            meanings |= _meanings(read, project, groups)
    return meanings


def main(words: Sequence[str]) -> int:
    """Runs `features plan WORDS`."""
    parser = argparse.ArgumentParser(
        prog="headrace features plan",
        description="What `dbt build` would do: tables, columns, ranges, rows, bytes, time. Nothing is run, "
        "nothing is written to the lake.",
        epilog="examples:\n  headrace features plan\n  headrace features plan --full-refresh --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--full-refresh", action="store_true", help="as `dbt build --full-refresh` would")
    parser.add_argument("--json", action="store_true", help="print the steps as JSON")
    given = parser.parse_args(words)
    home = Home.from_env()
    steps = plan_build(Lake.open(home), Project.parse(home), load_groups(), given.full_refresh)
    if given.json:
        print(json.dumps([asdict(step) for step in steps], indent=2, default=datetime.isoformat))
    else:
        console = Console()
        _show(steps, Console(width=max(console.width, 140)))
    return 0


def _show(steps: Sequence[Step], console: Console) -> None:
    todo = [step for step in steps if step.state != UP_TO_DATE]
    if not todo:
        console.print(f"nothing to do: {len(steps)} tables are up to date")
        return
    table = Table("table", "state", "known_at from", "until", "events", "rows", "bytes", "seconds", box=None)
    for step in todo:
        span = [f"{instant:%Y-%m-%d %H:%M}" for instant in (step.start, step.end)]
        guesses = [_about(step.rows, ",d"), _about(step.bytes, ",d"), _about(step.seconds, ".1f")]
        table.add_row(step.table, step.state, *span, f"{step.events:,}", *guesses)
    console.print(table)
    for line in _remarks(todo):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"{len(todo)} tables to build, {len(steps) - len(todo)} up to date", highlight=False)


def _remarks(todo: Sequence[Step]) -> Iterable[str]:
    for step in todo:
        for what, columns in (("new", step.columns_added), ("gone", step.columns_removed)):
            if columns:
                yield f"{step.table}: {what}: {', '.join(columns)}"
        if step.columns_changed:
            yield f"{step.table}: CHANGED IN MEANING under the same name: {', '.join(step.columns_changed)}"
    if any(step.refused for step in todo):
        yield "dbt build refuses a changed meaning: give it a new name, or accept it with --full-refresh"
    if any(step.seconds is None for step in todo):
        yield "-: no previous build to estimate from"


def _about(value: Any, form: str) -> str:
    return "-" if value is None else f"~{value:{form}}"
