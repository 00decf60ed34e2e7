"""`headrace lake compact | expire | orphans`: upkeep of the lake, by hand or from a timer."""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from warehouse.errors import HeadraceError, disk_full_said
from warehouse.features.declarations import load_groups
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.maintenance import compact, expire, orphans, remove_orphans

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def main(words: Sequence[str]) -> int:
    """Runs `lake WORDS`."""
    parser = argparse.ArgumentParser(
        prog="headrace lake",
        description="Keeps the lake small; no row changes. Landing, serving and dbt may go on beside it.",
        epilog="examples:\n  headrace lake compact\n  headrace lake compact --table lake.events --json\n"
        "  headrace lake expire --older-than 7d --dry-run\n  headrace lake orphans --delete",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="compact | expire | orphans")
    one = actions.add_parser("compact", help="rewrite small files as few sorted ones, one commit per table")
    two = actions.add_parser("expire", help="forget old snapshots and remove the files that only those name")
    three = actions.add_parser("orphans", help="list files that no snapshot names: left by a full disk or a killed process")
    for action in (one, two):
        action.add_argument("--table", metavar="NAME", help="one table (default: all)")
    for action, default, what in ((two, "7d", "snapshots"), (three, "1d", "files")):
        action.add_argument(
            "--older-than", default=default, metavar="AGE", help=f"of the {what}, such as 36h (default %(default)s)"
        )
    two.add_argument("--dry-run", action="store_true", help="say what would go, and keep it")
    three.add_argument("--delete", action="store_true", help="remove them")
    for action in (one, two, three):
        action.add_argument("--json", action="store_true")
    given = parser.parse_args(list(words)[1:])
    home = Home.from_env()
    lake = Lake.open(home)
    with disk_full_said(home.path):
        return _ACTIONS[given.action](given, lake, home)


def _compact(given: argparse.Namespace, lake: Lake, home: Home) -> int:
    groups = load_groups()
    done = [compact(lake, home, name, groups) for name in _tables(given, lake)]
    lines = [
        f"{one.table}: {one.files_before} files are now {one.files_after} ({one.rows:,} rows rewritten)"
        for one in done
        if one.rows
    ]
    return _told(given, [asdict(one) for one in done], lines or ["nothing to compact"])


def _expire(given: argparse.Namespace, lake: Lake, home: Home) -> int:
    before = datetime.now(UTC) - age(given.older_than)
    done = [expire(lake, name, before, given.dry_run) for name in _tables(given, lake)]
    verb = "would go" if given.dry_run else "gone"
    lines = [
        f"{one.table}: {one.snapshots} snapshots, {one.files} files, {one.bytes:,} bytes {verb}"
        for one in done
        if one.snapshots or one.files
    ]
    return _told(given, [asdict(one) for one in done], lines or ["nothing is old enough to expire"])


def _orphans(given: argparse.Namespace, lake: Lake, home: Home) -> int:
    found = orphans(lake, age(given.older_than))
    if given.delete:
        remove_orphans(found)
    verb = "removed" if given.delete else "named by no snapshot"
    lines = [f"{orphan.modified:%Y-%m-%d %H:%M} {orphan.bytes:>12,} {orphan.path}" for orphan in found]
    lines.append(f"{len(found)} files, {sum(orphan.bytes for orphan in found):,} bytes {verb}")
    told = [{**asdict(orphan), "path": str(orphan.path), "modified": orphan.modified.isoformat()} for orphan in found]
    return _told(given, told, lines)


_ACTIONS: dict[str, Callable[[argparse.Namespace, Lake, Home], int]] = {
    "compact": _compact,
    "expire": _expire,
    "orphans": _orphans,
}


def _tables(given: argparse.Namespace, lake: Lake) -> list[str]:
    if given.table is None:
        return lake.tables()
    lake.table(given.table)  # refuses an unknown name with those there are
    return [given.table]


def _told(given: argparse.Namespace, as_json: list[dict[str, Any]], lines: list[str]) -> int:
    print(json.dumps(as_json, indent=2) if given.json else "\n".join(lines))
    return 0


def age(text: str) -> timedelta:
    """`36h`, `7d`, `90m`, `0s`. Raises HeadraceError for anything else."""
    match = re.fullmatch(r"(\d+)([smhd])", text)
    if match is None:
        raise HeadraceError(f"an age is a whole number and one of s, m, h, d, such as 7d or 36h; got {text!r}")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})
