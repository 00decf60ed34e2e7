"""What a runner leaves behind about once a second, for `headrace stream status` to read."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import orjson

from streaming_sql.feed import Taken
from streaming_sql.online_store import OnlineStore
from warehouse.clock import Clock

RUNNER_FILE = "runner.json"
FEATURES = "features"
"""The name under which the runner keeps its position in the log."""


def iso(instant_us: int | None) -> str | None:
    """Microseconds as ISO-8601 in UTC; None for none and for 0 (never)."""
    if not instant_us:
        return None
    return datetime.fromtimestamp(instant_us / 1e6, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def write_runner_report(
    path: Path,
    store: OnlineStore,
    totals: Taken,
    num_behind: int,
    read_through_us: Sequence[int],
    per_s: float,
    clock: Clock,
    num_remembered: int,
    published_tick_us: int,
) -> None:
    """Replaces the file that `headrace stream status` reads; atomic. read_through_us: landed_at that each partition was read
    up to. per_s: records read per second since the last report. num_remembered: ids in the duplicate memory."""
    view = store.view()
    status = {
        "pid": os.getpid(),
        "updated_at": iso(clock.now_us()),
        "tick": iso(view.tick_us),
        "position": list(view.position),
        "num_behind": num_behind,
        "lag_s": max(clock.now_us() - min(read_through_us), 0) / 1e6 if num_behind else 0.0,
        "records_per_s": round(per_s, 1),
        **{name: value for name, value in asdict(totals).items() if name.startswith("num_")},
        "num_keys": store.num_keys(),
        "block_bytes": sum(store.num_bytes().values()),
        "num_head_events": store.num_head_events(),
        "num_remembered_ids": num_remembered,
        "process_bytes": _resident_bytes(),
        "published_tick": iso(published_tick_us),
        "work": {name: asdict(work) for name, work in store.work.items()},
        "keeps_for_good": [name for name, plan in store.plans.items() if plan.keeps_for_good],
    }
    half = path.with_suffix(".tmp")
    half.write_bytes(orjson.dumps(status))
    half.replace(path)


def _resident_bytes() -> int | None:
    """Memory that the process holds now; None where the system does not say (outside Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
