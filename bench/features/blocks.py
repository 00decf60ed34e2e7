"""(c) 5-minute blocks read from and written to Iceberg, beside a bare DuckDB group by. Removing duplicates is apart."""

from collections.abc import Callable
from pathlib import Path

import duckdb

from bench.features.declared import COUNTED, GROUP
from bench.features.lakes import STAGED, build_blocks, num_rows, staged
from bench.features.report import Report, Row
from bench.features.timing import in_turn
from warehouse.features.compute_source import Relations
from warehouse.home import Home

SIZES = {"quick": (200_000, 5_000), "default": (1_000_000, 20_000), "full": (10_000_000, 100_000)}


def measure(report: Report, folder: Path, size: str, repeat: int, say: Callable[[str], None]) -> None:
    num_events, num_keys = SIZES[size]
    say(f"(c) blocks of {num_events:,} events")
    lake, dedup = staged(Home(folder / "blocks"), num_events, num_keys)
    rows = lake.scan(STAGED, columns=("note_id", "event_type", "event_ts", "watch_ms"))
    counts = ", ".join(f"count(*) filter (where event_type = '{kind}')" for kind in COUNTED)
    grouped = (
        "create or replace table grouped as select note_id, time_bucket(interval 5 minutes, event_ts), "
        f"{counts}, sum(watch_ms) from events group by all"
    )
    with duckdb.connect() as connection:
        connection.register("rows", rows)
        connection.execute("create table events as select * from rows")
        connection.unregister("rows")
        del rows
        calls = {"ours": lambda: build_blocks(lake, GROUP), "peer": lambda: connection.execute(grouped)}
        spent, _ = in_turn(calls, max(repeat, 3))
        bare = connection.execute("select count(*) from grouped").fetchall()[0][0]
    stored = num_rows(lake, Relations.of(GROUP).blocks)
    if stored < bare:
        raise SystemExit(f"(c) {stored:,} block rows are stored, fewer than the {bare:,} of the group by")
    told = f"{num_events:,} events x {num_keys:,} keys"
    what = "(c) 5-minute blocks, Iceberg read and write / bare DuckDB group by"
    report.rows.append(Row(what, told, spent["ours"], spent["peer"], 0.3))
    report.facts.append(f"(c) {stored:,} block rows; removing duplicates took {dedup.wall_s:.1f} s ({dedup.cpu_s:.1f} s cpu)")
