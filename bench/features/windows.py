"""(a) 36 window features of N impressions, from Iceberg blocks, beside a NumPy program over the events.

The program knows nothing of late events: how many of its values leak is counted. dbt is timed as a whole command, start-up,
Iceberg commit and all.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from bench.features.declared import GROUP
from bench.features.lakes import STAGED, build_blocks, build_roll_ups, generated_spine, num_rows, staged
from bench.features.ours import DbtProject, by_compute, by_sql
from bench.features.peers import by_numpy
from bench.features.report import Report, Row
from bench.features.timing import in_turn, timed
from warehouse.features.compute_source import Relations
from warehouse.home import Home

SIZES = {"quick": (20_000, 200_000, 5_000), "default": (100_000, 1_000_000, 20_000), "full": (1_000_000, 10_000_000, 100_000)}


def measure(report: Report, folder: Path, size: str, repeat: int, say: Callable[[str], None]) -> None:
    num_impressions, num_events, num_keys = SIZES[size]
    told = f"{num_impressions:,} x {num_events:,} x {num_keys:,} keys"
    say(f"(a) building {told}")
    home = Home(folder / "windows")
    lake, _ = staged(home, num_events, num_keys)
    blocks, _ = timed(lambda: build_blocks(lake, GROUP))
    build_roll_ups(lake, GROUP)
    with lake.duckdb() as connection:
        connection.execute(
            f"copy (select note_id, event_type, event_ts, watch_ms from {STAGED}) to '{folder / 'events.parquet'}'"
        )
    spine = generated_spine(num_impressions, num_keys)
    project = DbtProject(lake, home, spine, folder / "project")
    say("(a) compute, NumPy by hand and dbt run in turn")
    calls = {
        "compute": lambda: by_compute(lake, spine),
        "numpy": lambda: by_numpy(folder / "events.parquet", spine),
        "dbt": project.run,
    }
    spent, found = in_turn(calls, repeat)
    total, equal = same_values(found["compute"], found["numpy"])
    must_be_equal("dbt run", found["compute"], project.rows())
    say("(a) point_in_time SQL")
    sql, by_the_sql = timed(lambda: by_sql(lake, spine, folder))
    must_be_equal("point_in_time SQL", found["compute"], by_the_sql)
    report.rows += [
        Row("(a) compute / NumPy by hand", told, spent["compute"], spent["numpy"], 1 / 1.5),
        Row("(a) dbt run, whole command / NumPy by hand", told, spent["dbt"], spent["numpy"], 1 / 3.5),
        Row("(a) compute and building the blocks / NumPy by hand", told, spent["compute"] + blocks, spent["numpy"]),
        Row("(a) point_in_time SQL / NumPy by hand", told, sql, spent["numpy"]),
    ]
    report.facts += [
        f"(a) {num_rows(lake, Relations.of(GROUP).blocks):,} block rows; dbt's count for its model alone: {found['dbt']:.1f} s",
        f"(a) {total:,} values, compute, dbt and SQL equal; in {total - equal:,} NumPy by hand saw events before they landed",
    ]


def same_values(ours: pa.Table, other: pa.Table | dict[str, np.ndarray]) -> tuple[int, int]:
    """(values, how many are equal) over all features."""
    total = equal = 0
    for name in GROUP.feature_names:
        left = ours[name].to_numpy()
        right = other[name] if isinstance(other, dict) else other[name].to_numpy()
        total += len(left)
        equal += int((left == right).sum())
    return total, equal


def must_be_equal(what: str, ours: pa.Table, other: pa.Table) -> None:
    total, equal = same_values(ours, other)
    if total != equal:
        raise SystemExit(f"{what}: {total - equal:,} of {total:,} values differ from compute; the timings mean nothing")
