"""(d) Last-value join beside Feast's DuckDB store: for each row of a spine the newest value of its key before the row's time.

Ours is `compute` of a `last_n` of one, fresh: Iceberg read, row ids and order kept, to Arrow. Feast reads the same rows from
one Parquet file, in an environment of its own below $HEADRACE_HOME; its imports and `apply` do not count. Feast lays out every
pair of a row and an earlier value: at the largest size that is more than 18 GB, so it is held to a limit and may fail there.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.features.declared import DAYS, START_US, newest_value
from bench.features.lakes import RETRACTED, STAGED, add, no_roll_ups, replace, select
from bench.features.ours import compute_chunks
from bench.features.report import Report, Row
from bench.features.timing import Spent, timed
from warehouse.events import TIMESTAMP
from warehouse.features.compute_engine import RETRACTIONS, SHADOWED, Relations
from warehouse.features.render import block_sql, retractions_sql, staging_sql
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.time_algebra import DAY_US

SIZES = {
    "quick": ((10_000, 50_000, 1_000),),
    "default": ((20_000, 100_000, 1_000), (50_000, 250_000, 1_000), (100_000, 500_000, 2_000)),
    "full": ((100_000, 500_000, 10_000), (400_000, 2_000_000, 10_000), (1_000_000, 5_000_000, 10_000)),
}
GROUP = newest_value()
LIMIT_S = 1800
LIMIT_BYTES = 16 << 30


def measure(report: Report, folder: Path, size: str, repeat: int, say: Callable[[str], None]) -> None:
    say("(d) looking for Feast")
    python = _feast()
    if python is None:
        report.facts.append("(d) Feast: not installed, and pip could not install it; only ours is timed")
    for num_rows, num_events, num_keys in SIZES[size]:
        told = f"{num_rows:,} x {num_events:,} x {num_keys:,} keys"
        say(f"(d) last-value join {told}")
        here = folder / f"last{num_rows}"
        here.mkdir()
        lake, spine = _generated(here, num_rows, num_events, num_keys)
        ours, answer = timed(lambda lake=lake, spine=spine: pa.concat_tables(compute_chunks(lake, spine, GROUP)), repeat)
        report.facts.append(f"(d) ours {told}: {ours.wall_s:.2f} s ({ours.cpu_s:.2f} cpu)")
        if python is None:
            continue
        theirs = _by_feast(python, here)
        if isinstance(theirs, str):
            report.facts.append(f"(d) Feast {told}: {theirs}")
            continue
        spent, values, version = theirs
        lists = answer["note_value_30d"].to_pylist()
        if [int(entry[0]) if entry else None for entry in lists] != values:
            raise SystemExit("(d) Feast's values differ from compute's; the timings mean nothing")
        report.rows.append(Row(f"(d) last-value join / Feast {version}", told, ours, spent, 80))


def _generated(folder: Path, num_rows: int, num_events: int, num_keys: int) -> tuple[Lake, pa.Table]:
    """Rows at even microseconds, no two alike, and a spine at odd ones: "before" and "at or before" are the same."""
    rng = np.random.default_rng(9)
    event_us = START_US + 2 * np.sort(rng.choice(DAYS * DAY_US // 2, num_events, replace=False, shuffle=False))
    key = pa.array(np.char.add("n", rng.integers(0, num_keys, num_events).astype(str)))
    value = rng.integers(0, 60_000, num_events)
    request_us = START_US + 2 * rng.integers(0, DAYS * DAY_US // 2, num_rows) + 1
    spine = pa.table(
        {
            "row_id": np.arange(num_rows),
            "note_id": np.char.add("n", rng.integers(0, num_keys, num_rows).astype(str)),
            "request_ts": pa.array(request_us).cast(TIMESTAMP),
        }
    )
    rows = pa.table({"note_id": key, "event_ts": pa.array(event_us).cast(TIMESTAMP), "value": value})
    pq.write_table(rows, folder / "rows.parquet")
    pq.write_table(spine, folder / "spine.parquet")
    lake = Lake.open(Home(folder / "home"))
    text = pa.array(np.char.add(np.char.add('{"watch_ms": ', value.astype(str)), "}"))
    numbers = np.arange(num_events)
    none = pa.nulls(num_events, pa.string())
    log = pa.table(
        {
            "event_id": np.char.add("e", numbers.astype(str)),
            "event_type": pa.array(["watch"]).take(pa.array(np.zeros(num_events, int))),
            "note_id": key,
            "event_ts": rows["event_ts"],
            "landed_at": rows["event_ts"],
            "log_partition": pa.array(np.zeros(num_events, np.int32)),
            "log_offset": numbers,
            "properties": text,
            **dict.fromkeys(("user_id", "author_id", "surface", "request_id", "impression_id", "retracts"), none),
        }
    )
    with lake.duckdb() as connection:
        connection.register("log", log)
        staged = connection.execute(staging_sql("log")).to_arrow_table()
        retractions = connection.execute(retractions_sql("log")).to_arrow_table()
    add(lake, STAGED, staged)
    empty = staged.slice(0, 0)
    shadowed = empty.append_column("retracts", pa.array([], pa.string()))
    replace(lake, SHADOWED, shadowed.append_column("shadowed_by", pa.array([], pa.list_(pa.int64()))))
    replace(lake, RETRACTIONS, retractions)
    replace(lake, RETRACTED, empty.append_column("retracted_at", pa.array([], TIMESTAMP)))
    add(lake, Relations.of(GROUP).blocks, select(lake, f"from ({block_sql(GROUP, STAGED, RETRACTED)}) limit 0"))
    no_roll_ups(lake, GROUP)
    return lake, spine


def _feast() -> Path | None:
    """The Python of an environment with Feast, made on first use; None where it cannot be made."""
    folder = Home.from_env().path / "bench" / "feast"
    python = folder / "bin" / "python"
    check = [str(python), "-c", "import feast, ibis, duckdb"]
    if python.exists() and subprocess.run(check, capture_output=True, check=False).returncode == 0:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    for command in ([sys.executable, "-m", "venv", str(folder)], [str(python), "-m", "pip", "install", "-q", "feast[duckdb]"]):
        if subprocess.run(command, capture_output=True, check=False).returncode:
            shutil.rmtree(folder, ignore_errors=True)
            return None
    return python


def _by_feast(python: Path, folder: Path) -> tuple[Spent, list[int | None], str] | str:
    """What it took, the values in the order of the spine and Feast's version; or why there are none."""
    command = [str(python), str(Path(__file__).with_name("feast_program.py")), str(folder), str(LIMIT_BYTES)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S, cwd=folder)
    except subprocess.TimeoutExpired:
        return f"not done after {LIMIT_S} s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return f"failed within {LIMIT_BYTES >> 30} GiB, exit status {done.returncode}: {last[:200]}"
    told = json.loads(done.stdout.strip().splitlines()[-1])
    rows = pq.read_table(folder / "feast.parquet").sort_by("row_id")
    return Spent((told["wall_s"],), (told["cpu_s"],)), rows["value"].to_pylist(), told["version"]
