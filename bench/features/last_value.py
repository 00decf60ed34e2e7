"""(d) Last-value join beside Feast's DuckDB store: for each row of a spine the newest value of its key before the row's time.

Ours is `compute` of a `kind: table` feature: Iceberg read, row ids and order kept, to Arrow. It knows what had arrived by the
tick, so the rows here lie where both mean the same: none in the 30 seconds before a row of the spine. Feast reads the same
rows from one Parquet file, in an environment of its own below $HEADRACE_HOME; its imports and `apply` do not count. Feast
lays out every pair of a row and an earlier value, 250 million at the largest size; it may hold 12 GiB in memory and spills the
rest.
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

from bench.features.declared import DAYS, START_US
from bench.features.report import Report, Row
from bench.features.timing import Spent, timed
from warehouse.events import TIMESTAMP
from warehouse.features.compute import compute
from warehouse.features.kinds.declared import Kinds, TableFeatures
from warehouse.features.kinds.values import Typed
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.time_algebra import DAY_US, FIVE_MINUTES_US, GRACE_US

SIZES = {
    "quick": ((10_000, 50_000, 1_000),),
    "default": ((20_000, 100_000, 1_000), (50_000, 250_000, 1_000), (100_000, 500_000, 2_000)),
    "full": ((100_000, 500_000, 10_000), (400_000, 2_000_000, 10_000), (1_000_000, 5_000_000, 10_000)),
}
RELATION = "outside.notes"
NEWEST = Kinds(
    tables=(
        TableFeatures(
            "newest",
            "note",
            ("note_id",),
            RELATION,
            "event_ts",
            "event_ts",
            ("value",),
            (("value", Typed("note_value", "bigint", None, (), "")),),
            "bench",
        ),
    )
)
LIMIT_S = 2400
LIMIT_BYTES = 12 << 30


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
        ours, answer = timed(lambda lake=lake, spine=spine: compute(lake, spine, groups={}, kinds=NEWEST), repeat)
        report.facts.append(f"(d) ours {told}: {ours.wall_s:.2f} s ({ours.cpu_s:.2f} cpu)")
        if python is None:
            continue
        theirs = _by_feast(python, here)
        if isinstance(theirs, str):
            report.facts.append(f"(d) Feast {told}: {theirs}")
            continue
        spent, values, version = theirs
        if answer["note_value"].to_pylist() != values:
            raise SystemExit("(d) Feast's values differ from compute's; the timings mean nothing")
        report.rows.append(Row(f"(d) last-value join / Feast {version}", told, ours, spent, 80))


def _generated(folder: Path, num_rows: int, num_events: int, num_keys: int) -> tuple[Lake, pa.Table]:
    """Rows of no two alike times, none within the grace after a tick; a spine of requests that end it."""
    rng = np.random.default_rng(9)
    slots = DAYS * DAY_US // FIVE_MINUTES_US
    wide_us = FIVE_MINUTES_US - GRACE_US
    ticks = np.sort(rng.choice(slots * wide_us, num_events, replace=False, shuffle=False))
    event_us = START_US + ticks // wide_us * FIVE_MINUTES_US + GRACE_US + ticks % wide_us
    rows = pa.table(
        {
            "note_id": np.char.add("n", rng.integers(0, num_keys, num_events).astype(str)),
            "event_ts": pa.array(event_us).cast(TIMESTAMP),
            "value": rng.integers(0, 60_000, num_events),
        }
    )
    request_us = START_US + rng.integers(1, slots, num_rows) * FIVE_MINUTES_US + GRACE_US
    spine = pa.table(
        {
            "row_id": np.arange(num_rows),
            "note_id": np.char.add("n", rng.integers(0, num_keys, num_rows).astype(str)),
            "request_ts": pa.array(request_us).cast(TIMESTAMP),
        }
    )
    pq.write_table(rows, folder / "rows.parquet")
    pq.write_table(spine, folder / "spine.parquet")
    lake = Lake.open(Home(folder / "home"))
    lake.create(RELATION, rows.schema)
    lake.append(RELATION, rows)
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
