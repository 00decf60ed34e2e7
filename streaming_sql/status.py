"""Where the stream stands: what the log, the lake and the last runner say, as plain data."""

import contextlib
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from streaming_sql.event_log import EventLog
from streaming_sql.feed import Taken
from streaming_sql.online_store import OnlineStore
from warehouse.clock import Clock
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import landed_position
from warehouse.time_algebra import closed_tick

RUNNER_FILE = "runner.json"


def iso(instant_us: int | None) -> str | None:
    """Microseconds as ISO-8601 in UTC; None for none and for 0 (never)."""
    if not instant_us:
        return None
    return datetime.fromtimestamp(instant_us / 1e6, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def write_runner_status(path: Path, store: OnlineStore, totals: Taken, num_behind: int, clock: Clock) -> None:
    """Replaces the file that `headrace stream status` reads; atomic."""
    view = store.view()
    status = {
        "pid": os.getpid(),
        "updated_at": iso(clock.now_us()),
        "tick": iso(view.tick_us),
        "position": list(view.position),
        "num_behind": num_behind,
        **{name: value for name, value in asdict(totals).items() if name.startswith("num_")},
        "num_keys": store.num_keys(),
        "block_bytes": sum(store.num_bytes().values()),
    }
    half = path.with_suffix(".tmp")
    half.write_bytes(orjson.dumps(status))
    half.replace(path)


def stream_status(home: Home, clock: Clock) -> dict[str, Any]:
    """What is in the log, what of it is in the lake, which tick it closes, and what the last runner reported."""
    lake = Lake.open(home)
    landed = landed_position(lake)
    status: dict[str, Any] = {"clock": iso(clock.now_us()), "landed": list(landed), "log": None, "runner": None}
    if (home.log / "events.db").exists():
        log = EventLog.open(home.log, len(landed), clock)
        with contextlib.closing(log):
            end, read_through = log.end(), log.read_through_us()
            status["log"] = {
                "end": list(end),
                "num_not_landed": sum(max(own - there, 0) for own, there in zip(end, landed, strict=True)),
                "newest": [iso(instant) for instant in read_through],
                "closes_tick": iso(closed_tick(read_through)) if all(read_through) else None,
                "bytes": log.num_bytes(),
            }
    file = home.online / RUNNER_FILE
    if file.exists():
        status["runner"] = orjson.loads(file.read_bytes())
        status["runner"]["is_running"] = _is_running(status["runner"]["pid"])
    return status


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
