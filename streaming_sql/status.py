"""Where the stream stands: what the log, the lake and the last runner say, as plain data."""

import contextlib
import os
from typing import Any

import orjson

from streaming_sql.open_log import has_log, open_log
from streaming_sql.runner_report import FEATURES, RUNNER_FILE, iso
from streaming_sql.settings import StreamSettings
from warehouse.clock import Clock
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import landed_position
from warehouse.time_algebra import closed_tick


def stream_status(home: Home, clock: Clock, settings: StreamSettings) -> dict[str, Any]:
    """What is in the log, what of it is in the lake, which tick it closes, and what the last runner reported."""
    lake = Lake.open(home)
    landed = landed_position(lake)
    status: dict[str, Any] = {"clock": iso(clock.now_us()), "landed": list(landed), "log": None, "runner": None}
    if has_log(home, settings):
        with contextlib.closing(open_log(home, lake, clock, settings)) as log:
            end, read_through, reader = log.end(), log.read_through_us(), log.committed(FEATURES)
            status["log"] = {
                "kind": settings.event_log.partition(":")[0],
                "start": list(log.start()),
                "end": list(end),
                "num_not_landed": sum(max(own - there, 0) for own, there in zip(end, landed, strict=True)),
                "newest": [iso(instant) for instant in read_through],
                "closes_tick": iso(closed_tick(read_through)) if all(read_through) else None,
                "reader": list(reader) if reader else None,
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
