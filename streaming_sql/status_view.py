"""`headrace stream status` for people: lines once, or a live picture with rates between two looks."""

import time
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from streaming_sql.settings import StreamSettings
from streaming_sql.status import stream_status
from warehouse.clock import Clock
from warehouse.home import Home


def status_lines(status: dict[str, Any]) -> list[str]:
    """The status in a few lines of text."""
    lines = [f"clock    {status['clock']}", f"landed   {status['landed']}"]
    log, runner = status["log"], status["runner"]
    if log is None:
        lines.append("log      none yet; it is made by the first event or by `headrace stream run`")
    else:
        size = "" if log["bytes"] is None else f", {log['bytes'] / 1e6:.1f} MB"
        lines.append(f"log      {log['kind']}, keeps {log['start']} to {log['end']}, {log['num_not_landed']} not landed{size}")
        lines.append(f"         newest {', '.join(map(str, log['newest']))}; closes tick {log['closes_tick']}")
    if runner is None:
        return [*lines, "runner   has never reported"]
    state = f"process {runner['pid']}" if runner["is_running"] else "not running"
    lines.append(
        f"runner   {state}, last heard {runner['updated_at']}: tick {runner['tick']}, {runner['num_behind']} records behind"
    )
    lines.append(
        f"         events {runner['num_events']}, late {runner['num_late']}, duplicates {runner['num_duplicates']}, "
        f"dead letters {runner['num_dead']}; blocks {runner['block_bytes'] / 1e6:.1f} MB"
        + "".join(f", {name} kept for good" for name in runner.get("keeps_for_good", ()))
    )
    if "process_bytes" in runner:
        process = "" if runner["process_bytes"] is None else f"process {runner['process_bytes'] / 1e6:,.0f} MB, "
        keys = sum(runner["num_keys"].values())
        lines.append(
            f"memory   {process}{keys:,} keys, {runner['num_head_events']:,} head events, "
            f"{runner['num_remembered_ids']:,} remembered ids; published tick {runner['published_tick']}"
        )
        touched, added, merged = (
            sum(work[f"num_{what}"] for work in runner["work"].values())
            for what in ("keys_touched", "blocks_added", "blocks_merged")
        )
        lines.append(f"work     {touched:,} keys touched by {added:,} new blocks, {merged:,} blocks merged")
    return lines


def watch(home: Home, clock: Clock, settings: StreamSettings, every_s: float, looks: int | None = None) -> None:
    """Shows the status every `every_s` seconds until Ctrl-C, or `looks` times."""
    before: tuple[float, dict[str, Any]] | None = None
    with Live(Text("looking …"), auto_refresh=False) as live:
        while looks is None or looks > 0:
            status, at = stream_status(home, clock, settings), time.monotonic()
            live.update(_picture(status, _rates(before, (at, status))), refresh=True)
            before = (at, status)
            looks = None if looks is None else looks - 1
            if looks != 0:
                time.sleep(every_s)


def _rates(before: tuple[float, dict[str, Any]] | None, now: tuple[float, dict[str, Any]]) -> dict[str, float]:
    """Records per second between two looks: appended to the log, read by the runner, landed in the lake."""
    if before is None or before[1]["log"] is None or now[1]["log"] is None:
        return {}
    seconds = now[0] - before[0]
    rates = {
        "appended": sum(now[1]["log"]["end"]) - sum(before[1]["log"]["end"]),
        "landed": sum(now[1]["landed"]) - sum(before[1]["landed"]),
    }
    runners = [one[1]["runner"] for one in (before, now)]
    if all(runners):
        rates["read"] = sum(runners[1]["position"]) - sum(runners[0]["position"])
    return {name: max(count, 0) / seconds for name, count in rates.items()}


def _picture(status: dict[str, Any], rates: dict[str, float]) -> Group:
    log, runner = status["log"], status["runner"]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("position", "behind", "per second"):
        table.add_column(name, justify="right")
    if log is not None:
        table.add_row("log", _position(log["end"]), "", _rate(rates, "appended"))
        if runner is not None:
            table.add_row("features", _position(runner["position"]), f"{runner['num_behind']:,}", _rate(rates, "read"))
        table.add_row("lake", _position(status["landed"]), f"{log['num_not_landed']:,}", _rate(rates, "landed"))
    told = [Text(f"clock     {status['clock']}")]
    if log is not None:
        told.append(Text(f"watermark {log['closes_tick']} (the log closes it)"))
    if runner is None:
        told.append(Text("runner    has never reported; start `headrace stream run` or `headrace serve`", style="yellow"))
    else:
        state = f"process {runner['pid']}" if runner["is_running"] else "not running"
        style = "" if runner["is_running"] else "yellow"
        told.append(Text(f"runner    {state}, tick {runner['tick']}, lag {runner['lag_s']:.1f} s", style=style))
        counts = ", ".join(
            f"{name} {runner[f'num_{field}']:,}"
            for name, field in (("events", "events"), ("late", "late"), ("duplicates", "duplicates"), ("dead letters", "dead"))
        )
        told.append(Text(f"          {counts}, retractions {runner['num_retractions']:,}"))
    return Group(*told, Text(""), table)


def _position(offsets: list[int]) -> str:
    return " ".join(f"{offset:,}" for offset in offsets)


def _rate(rates: dict[str, float], name: str) -> str:
    return f"{rates[name]:,.0f}" if name in rates else "–"
