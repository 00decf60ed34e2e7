"""What a retraction looks up: the events that decide its target's block, among those of a lake of hourly files.

    python -m bench.retractions [--hours 240] [--events 2875] [--json]

For targets of the last hour, of three days and of the oldest, and for an id that was never there: processor and wall
milliseconds of a look-up, the best of several; beside it, in the same run, the same search of every file, which must find the
same rows. Then what the index took to make and how large it is.
"""

import argparse
import contextlib
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from streaming_sql.event_index import INDEX_FOLDER
from streaming_sql.event_log import EventLog
from streaming_sql.history import LakeAndLog, around, asked
from warehouse.clock import ManualClock
from warehouse.events import EVENTS_SCHEMA, NUM_PARTITIONS, TIMESTAMP
from warehouse.features.declarations import load_groups
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import EVENTS, create_tables, land_records, landed_position
from warehouse.time_algebra import DAY_US, HOUR_US, SECOND_US

START_US = 1_651_766_400_000_000  # 2022-05-05T16:00:00Z
LATE_SHARE = 0.03
REPEATED = 5


def main() -> int:
    parser = argparse.ArgumentParser(description="What a retraction looks up in the lake, and what that costs.")
    parser.add_argument("--hours", type=int, default=240, help="files of the lake, one an hour (default %(default)s)")
    parser.add_argument("--events", type=int, default=2875, help="events of each (default %(default)s)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not 80 <= given.hours <= 2000 or not 100 <= given.events <= 1_000_000:
        parser.error("--hours must be 80 to 2000, --events 100 to 1000000")
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        result = measure(Home(Path(folder)), given.hours, given.events)
    print(json.dumps(result) if given.json else as_text(result))
    return 0 if result["num_different"] == 0 else 1


def measure(home: Home, hours: int, per_hour: int) -> dict[str, Any]:
    lake = Lake.open(home)
    targets = _land(lake, hours, per_hour)
    clock = ManualClock(START_US + hours * HOUR_US)
    keys = [group.entity_keys for group in load_groups().values()]
    looks, num_different = [], 0
    with contextlib.closing(EventLog.open(home.log, clock=clock, start=landed_position(lake))) as log:
        history, position = LakeAndLog(lake, log), log.end()
        processor_s = time.process_time()
        history.prepare()
        processor_s = time.process_time() - processor_s
        for name, event_id in targets.items():
            rows, ours = _timed(lambda event_id=event_id: history.around([event_id], keys, position, 0))
            expected, theirs = _timed(lambda event_id=event_id: _of_every_file(lake, event_id, keys))
            num_different += _texts(rows) != _texts(expected)
            looks.append({"target": name, "rows": rows.num_rows, **ours, "every_file": theirs})
    files = list((home.online / INDEX_FOLDER).iterdir())
    index = {"files": len(files), "bytes": sum(file.stat().st_size for file in files), "cpu_s": processor_s}
    load = " ".join(f"{one:.1f}" for one in os.getloadavg())
    machine = f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}, load average {load} at the end"
    events = hours * per_hour
    return {"machine": machine, "events": events, "looks": looks, "index": index, "num_different": num_different}


def _of_every_file(lake: Lake, event_id: str, keys: list[tuple[str, ...]]) -> pa.Table:
    with lake.reader([EVENTS]) as connection:
        connection.execute("set threads = 1; create temp view history as select * from lake.events")
        connection.register("given", asked([event_id]))
        connection.execute("create temp table asked as select * from given")
        return around(connection, keys)


def _land(lake: Lake, hours: int, per_hour: int) -> dict[str, str]:
    """Lands the events, hour by hour, some of them days late; ids to look up."""
    create_tables(lake)
    rng, offsets, ids = np.random.default_rng(7), np.zeros(NUM_PARTITIONS, dtype=np.int64), []
    for hour in range(hours):
        landed = np.sort(START_US + hour * HOUR_US + rng.integers(0, HOUR_US, per_hour))
        is_late = rng.random(per_hour) < LATE_SHARE
        late = np.where(is_late, rng.integers(0, 6 * DAY_US, per_hour), rng.integers(0, 2 * SECOND_US, per_hour))
        partition, offset = rng.integers(0, NUM_PARTITIONS, per_hour), np.empty(per_hour, dtype=np.int64)
        for number in range(NUM_PARTITIONS):
            own = partition == number
            offset[own] = offsets[number] + np.arange(own.sum())
            offsets[number] += own.sum()
        ids.append([f"{place:x}-{bits:x}" for place, bits in enumerate(rng.integers(1 << 60, size=per_hour), hour * per_hour)])
        columns = {field.name: pa.nulls(per_hour, field.type) for field in EVENTS_SCHEMA} | {
            "event_id": pa.array(ids[-1]),
            "event_type": pa.array(rng.choice(["view", "click", "like"], per_hour)),
            "user_id": pa.array([f"u{number}" for number in rng.integers(20_000, size=per_hour)]),
            "note_id": pa.array([f"n{number}" for number in rng.integers(10_000, size=per_hour)]),
            "author_id": pa.array([f"a{number}" for number in rng.integers(1000, size=per_hour)]),
            "event_ts": pa.array(landed - late).cast(TIMESTAMP),
            "landed_at": pa.array(landed).cast(TIMESTAMP),
            "log_partition": pa.array(partition.astype(np.int32)),
            "log_offset": pa.array(offset),
            "landing": pa.array(["log"] * per_hour),
        }
        records = pa.table({field.name: columns[field.name].cast(field.type) for field in EVENTS_SCHEMA}, EVENTS_SCHEMA)
        land_records(lake, records, tuple(offsets.tolist()))
    middle = per_hour // 2
    return {"last hour": ids[-1][middle], "three days": ids[-73][middle], "oldest": ids[0][middle], "unknown": "never"}


def _timed(look: Any) -> tuple[pa.Table, dict[str, float]]:
    """What it found, and the best of several: milliseconds."""
    processor, wall = [], []
    for _ in range(REPEATED):
        started = time.process_time(), time.perf_counter()
        rows = look()
        processor.append(time.process_time() - started[0])
        wall.append(time.perf_counter() - started[1])
    return rows, {"cpu_ms": min(processor) * 1000, "wall_ms": min(wall) * 1000}


def _texts(rows: pa.Table) -> list[str]:
    return sorted(map(str, rows.to_pylist()))


def as_text(result: dict[str, Any]) -> str:
    lines = [result["machine"], f"{result['events']:,} events; ms of processor (of the clock) a look-up:"]
    for look in result["looks"]:
        theirs = look["every_file"]
        lines.append(
            f"  {look['target']:<11} {look['cpu_ms']:7.1f} ({look['wall_ms']:.1f}), {look['rows']} rows; "
            f"every file {theirs['cpu_ms']:.1f} ({theirs['wall_ms']:.1f})"
        )
    index = result["index"]
    lines.append(f"index of {index['files']} files: {index['bytes'] / 1e6:.1f} MB, {index['cpu_s']:.1f} s of processor to make")
    lines.append(f"{result['num_different']} look-ups found other rows than the search of every file")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
