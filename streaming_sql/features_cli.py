"""`headrace features get`: the features of one entity, now or at a past instant, and the blocks that they came from."""

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from streaming_sql.explain import Explanation
from streaming_sql.read_features import as_json, read_at, read_now
from streaming_sql.records import to_us
from streaming_sql.runner_report import iso
from streaming_sql.settings import StreamSettings
from warehouse.clock import Clock
from warehouse.errors import HeadraceError
from warehouse.features.declarations import load_groups
from warehouse.home import Home
from warehouse.lake import Lake

_EXAMPLES = """examples:
  headrace features get --entity note=S456
  headrace features get --entity user=U1,author=A2 --json
  headrace features get --entity note=S456 --at 2022-05-05T16:10:00Z --explain
"""
_INSTANTS = ("t_us", "tick_us", "known_at_us", "block_start", "known_at", "event_ts")


def main(words: list[str]) -> int:
    """Runs `features get`; words[:2] are the command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "headrace features get", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entity", required=True, metavar="KEY=ID[,KEY=ID]", help="note=S456, or user=U1,author=A2")
    parser.add_argument("--at", metavar="INSTANT", help="2022-05-05T16:10:00Z: what a request then would have read")
    parser.add_argument("--explain", action="store_true", help="also the blocks and events that the values came from")
    parser.add_argument("--json", action="store_true", help="print JSON, one object per feature group")
    given = parser.parse_args(words[2:])
    home, clock, groups, entity = Home.from_env(), Clock.from_env(), load_groups(), _entity(given.entity)
    if given.at is None:
        found = read_now(home, clock, StreamSettings.from_env(), groups, entity)
    else:
        found = read_at(Lake.open(home), groups, entity, _instant(given.at, clock))
    told = [_with_iso(as_json(one, given.explain)) for one in found]
    if given.json:
        print(json.dumps(told, indent=2))
        return 0
    console = Console()
    for explanation, plain in zip(found, told, strict=True):
        _print(console, explanation, plain)
    return 0


def _entity(text: str) -> dict[str, str]:
    entity = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not key or not equals or not value:
            raise HeadraceError(f"--entity is KEY=ID, several with commas (user=U1,author=A2), got {text!r}")
        entity[key if key.endswith("_id") else f"{key}_id"] = value
    return entity


def _instant(text: str, clock: Clock) -> int:
    try:
        t_us = to_us(text)
    except ValueError as error:
        raise HeadraceError(f"--at {error}") from None
    if t_us > clock.now_us():
        raise HeadraceError(f"--at {text} has not come yet; it is {iso(clock.now_us())}")
    return t_us


def _with_iso(told: Any) -> Any:
    if isinstance(told, dict):
        return {
            name.removesuffix("_us"): iso(value) if name in _INSTANTS and isinstance(value, int) else _with_iso(value)
            for name, value in told.items()
        }
    return [_with_iso(one) for one in told] if isinstance(told, list | tuple) else told


def _print(console: Console, explanation: Explanation, told: dict[str, Any]) -> None:
    position = f", position {list(explanation.position)}" if explanation.position else ""
    console.print(f"[bold]{explanation.group}[/bold] of {', '.join(explanation.key)} at {told['t']}", highlight=False)
    console.print(f"watermark {told['tick']}, known at {told['known_at']}{position}", highlight=False)
    values = Table("feature", "value", box=None)
    for name, value in told["values"].items():
        values.add_row(name, "NULL" if value is None else f"{value:.12g}")
    for name, items in told["sequences"].items():
        values.add_row(name, " ".join(items) or "(empty)")
    console.print(values)
    for title in ("blocks", "head"):
        rows = told.get(title)
        if rows is None:
            continue
        console.print(f"{title}: {len(rows)}", highlight=False)
        if rows:
            table = Table(*rows[0], box=None)
            for row in rows:
                table.add_row(*("" if value is None else str(value) for value in row.values()))
            console.print(table)
    console.print()
