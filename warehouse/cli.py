"""`headrace land | sql | features | export-training`."""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from warehouse.datasets.base import Dataset
from warehouse.errors import HeadraceError, disk_full_said
from warehouse.features.compute_plan import type_of
from warehouse.features.declarations import FeatureGroup, declarations_hash, load_groups
from warehouse.features.kinds.declared import load_kinds
from warehouse.features.kinds.shown import kind_rows
from warehouse.features.lineage import lineage
from warehouse.features.measures import Measure
from warehouse.home import Home, data_root
from warehouse.lake import Lake
from warehouse.locks import try_lock


def main(words: list[str]) -> int:
    """Runs one of this room's commands."""
    command, *rest = words
    with disk_full_said(Home.from_env().path):
        return {"land": _land, "sql": _sql, "features": _features, "export-training": _export_training}[command](rest)


def _parser(command: str, what: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"headrace {command}",
        description=what,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _land(words: list[str]) -> int:
    from warehouse.datasets import kuairand
    from warehouse.landing import Landed, land_dataset
    from warehouse.landing_files import land_file

    parser = _parser(
        "land",
        "Brings events into lake.events, exactly once: the same source again adds nothing.",
        "  headrace land kuairand\n  headrace land simulator --seed 7 --days 4\n"
        "  headrace land events.ndjson --landed-at received_at\n  headrace land events.parquet --delay 2",
    )
    parser.add_argument("source", help="kuairand, simulator, or a file ending in .parquet, .csv or .ndjson")
    parser.add_argument("--seed", type=int, default=7, help="simulator: what to simulate (default %(default)s)")
    parser.add_argument("--users", type=int, default=4000, help="simulator: how many readers (default %(default)s)")
    parser.add_argument("--notes", type=int, default=3000, help="simulator: how many notes (default %(default)s)")
    parser.add_argument("--days", type=int, default=8, help="simulator: how long (default %(default)s)")
    parser.add_argument("--landed-at", metavar="COLUMN", help="file: the column that says when each event landed")
    parser.add_argument("--delay", type=float, metavar="SECONDS", help="file: declare landed_at as event_ts plus this delay")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    given = parser.parse_args(words)
    home = Home.from_env()
    _refuse_beside_a_server(home)
    lake = Lake.open(home)
    path = Path(given.source)
    if given.source not in ("kuairand", "simulator") and path.suffix not in (".parquet", ".csv", ".ndjson", ".jsonl"):
        raise HeadraceError(
            f"no source {given.source!r}: give kuairand, simulator, or a file ending in .parquet, .csv or .ndjson"
        )
    with Progress(console=Console(stderr=True), disable=given.json) as progress:
        task = progress.add_task(f"reading {given.source}", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, description="landing", completed=done, total=total)

        landed: Landed
        if given.source == "kuairand":
            landed = land_dataset(lake, kuairand.load(data_root() / "kuairand"), show)
        elif given.source == "simulator":
            landed = land_dataset(lake, _simulated(given), show)
        else:
            landed = land_file(lake, path, given.landed_at, given.delay, show)
    if given.json:
        print(json.dumps(landed.__dict__))
    elif landed.already:
        print(f"{landed.source} had landed before; nothing was added")
    else:
        print(f"{landed.source}: {landed.num_events:,} events landed, {landed.num_dead_letters:,} dead letters")
        if landed.num_dead_letters:
            print('why: headrace sql "select reason, count(*) from lake.dead_letters group by reason"')
    return 0


def _refuse_beside_a_server(home: Home) -> None:
    """A running server owns the offsets of the log: what lands beside it would take them."""
    for name in ("server.lock", "followers.lock"):  # of the worker that leads, and of the others, which outlive it
        handle = try_lock(home.log / name)
        if handle is None:
            raise HeadraceError(
                f"a server runs on {home.path} and owns the event log; stop it first, or send events to its /v1/events"
            )
        handle.close()


def _simulated(given: argparse.Namespace) -> Dataset:
    from warehouse.datasets.simulator import simulate

    try:
        return simulate(seed=given.seed, num_users=given.users, num_notes=given.notes, days=given.days)
    except ValueError as error:
        raise HeadraceError(f"simulator: {error}") from None


def _sql(words: list[str]) -> int:
    import duckdb

    parser = _parser(
        "sql",
        "Reads the lake with DuckDB's SQL. Read-only: one select, describe, show or explain.",
        '  headrace sql "show all tables"\n'
        '  headrace sql "select event_type, count(*) from lake.events group by all"\n'
        '  headrace sql --json "from features.note_engagement limit 3"',
    )
    parser.add_argument("query")
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines")
    given = parser.parse_args(words)
    with Lake.open(Home.from_env()).duckdb(read_only=True) as connection:
        try:
            statements = connection.extract_statements(given.query)
            if len(statements) != 1 or not _only_reads(connection, statements[0]):
                raise HeadraceError("one read-only statement at a time: select, from, describe, show or explain")
            answer = connection.sql(statements[0].query)
            if answer is None:
                return 0
            if given.json:
                for row in answer.to_arrow_table().to_pylist():
                    print(json.dumps(row, default=str, ensure_ascii=False))
            else:
                answer.show(max_width=200)
        except duckdb.Error as error:
            raise HeadraceError(str(error)) from None
    return 0


def _only_reads(connection: Any, statement: Any) -> bool:
    """Whether it is a select, or the explanation of one: `explain analyze` runs what it explains."""
    import duckdb

    if statement.type == duckdb.StatementType.SELECT:
        return True
    explained = re.match(r"\s*explain\s+(?:analyze\s+|\([^)]*\)\s*)?(?P<what>.*)", statement.query, re.IGNORECASE | re.DOTALL)
    return explained is not None and [inner.type for inner in connection.extract_statements(explained["what"])] == [
        duckdb.StatementType.SELECT
    ]


_FEATURE_COMMANDS = {
    "plan": "warehouse.features.plan",
    "compute": "warehouse.features.compute_cli",
    "document": "warehouse.features.document",
    "verify": "warehouse.features.verify",
}


def _features(words: list[str]) -> int:
    if words and words[0] in _FEATURE_COMMANDS:
        return int(importlib.import_module(_FEATURE_COMMANDS[words[0]]).main(words[1:]))
    parser = _parser(
        "features",
        "Shows and checks what is declared; plans a build; computes it for any spine; proves it on generated events.",
        "  headrace features check\n  headrace features list --json\n  headrace features show note_ctr_1d\n"
        "  headrace features plan\n  headrace features document --check\n"
        "  headrace features get --help\n  headrace features compute --help\n  headrace features verify --help",
    )
    parser.add_argument("action", choices=("check", "list", "show", *_FEATURE_COMMANDS))
    parser.add_argument("name", nargs="?", help="show: a feature")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--unit", action="store_true", help="check: also run the tests declared beside the groups")
    given = parser.parse_args(words)
    groups = load_groups()
    rows = [row for group in groups.values() for row in _feature_rows(group)]
    others = kind_rows(load_kinds())
    if given.action == "check":
        print(f"{len(rows)} features in {len(groups)} groups are well declared; hash {declarations_hash(groups)}")
        if others:
            print(f"{len(others)} features of other kinds are well declared: {', '.join(row['feature'] for row in others)}")
        return _unit_tests(groups) if given.unit else 0
    rows += others
    if given.action == "show":
        rows = [row for row in rows if row["feature"] == given.name]
        if not rows:
            raise HeadraceError(f"no feature {given.name!r}; see `headrace features list`")
        if owner := groups.get(rows[0].get("group", "")):
            rows[0]["lineage"] = lineage(owner, rows[0]["feature"])
    if given.json or given.action == "show":
        print(json.dumps(rows[0] if given.action == "show" else rows, indent=2))
        return 0
    table = Table("feature", "aggregation", "window", "freshness", "keys", box=None)
    for row in rows:
        table.add_row(row["feature"], row["aggregation"], row["window"] or "", row["freshness"], ", ".join(row["keys"]))
    Console().print(table)
    return 0


def _unit_tests(groups: dict[str, FeatureGroup]) -> int:
    """0 if every declared test passes, 1 with a sentence for each value that is not as expected."""
    from warehouse.features.unit import run_unit_tests

    results = list(run_unit_tests(groups))
    wrong = [sentence for _, told in results for sentence in told]
    print("\n".join([*wrong, f"{sum(not told for _, told in results)} of {len(results)} unit tests pass"]))
    return 1 if wrong else 0


def _empty(measure: Measure) -> Any:
    """The value of an empty set."""
    if measure.shape != "number":
        return {} if measure.shape == "map" else []
    return 0 if measure.aggregation in ("count", "sum", "approx_count_distinct") else measure.empty


def _feature_rows(group: FeatureGroup) -> list[dict]:
    common = {"group": group.name, "keys": list(group.keys), "events": group.events, "declared_in": group.source}
    rows = [
        {
            "feature": f"{group.entity}_{measure.name}_{window.name}",
            "aggregation": measure.aggregation,
            "of": measure.of,
            "where": measure.where,
            "window": window.name,
            "freshness": measure.freshness,
            "anchor": measure.anchor,
            "type": str(type_of(measure)),
            "empty": _empty(measure),
            **{
                setting: value
                for setting in ("n", "k", "q", "relative_error", "bucket_by")
                if (value := getattr(measure, setting)) is not None
            },
            **common,
        }
        for measure in group.measures
        for window in measure.windows
    ]
    freshness = "event" if any(measure.freshness == "event" for measure in group.measures) else "block"
    rows += [
        {
            "feature": f"{group.entity}_{derived.name}",
            "aggregation": "derived",
            "expression": derived.expression,
            "window": None,
            "freshness": freshness,
            "empty": None,
            **common,
        }
        for derived in group.derived
    ]
    return rows


def _export_training(words: list[str]) -> int:
    from warehouse.training_export import export_training

    parser = _parser(
        "export-training",
        "Writes training examples as Parquet under the home folder.",
        "  headrace export-training\n  headrace export-training --json",
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(words)
    home = Home.from_env()
    export = export_training(Lake.open(home), home)
    if given.json:
        print(json.dumps({"folder": str(export.folder), "num_rows": export.num_rows, "test_start": export.test_start}))
    else:
        print(f"{export.num_rows:,} examples in {export.folder}; tests from {export.test_start}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
