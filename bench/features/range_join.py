"""(b) The same values by a plain SQL range join, at growing sizes; a plot where there are several.

Beside `compute` also the portable SQL of `point_in_time`, over the same Iceberg blocks.
"""

from collections.abc import Callable
from pathlib import Path

from bench.features.declared import GROUP
from bench.features.lakes import STAGED, build_blocks, generated_spine, no_roll_ups, staged
from bench.features.ours import by_compute, by_sql
from bench.features.peers import by_range_join
from bench.features.plot import Line, draw
from bench.features.report import Report, Row
from bench.features.timing import Spent, timed
from bench.features.windows import must_be_equal
from warehouse.home import Home

SIZES = {
    "quick": ((2_000, 20_000), (5_000, 50_000)),
    "default": ((5_000, 50_000), (10_000, 100_000), (20_000, 200_000)),
    "full": ((12_500, 250_000), (25_000, 500_000), (50_000, 1_000_000), (100_000, 2_000_000)),
}
LIMIT_S = 240
"""The join is quadratic in a hot key; one that takes longer is stopped: its ratio is a lower bound, and the plot lacks it."""


def measure(
    report: Report, folder: Path, size: str, repeat: int, say: Callable[[str], None], images: Path | None = None
) -> None:
    found: list[tuple[int, Spent, Spent, Spent | None]] = []
    for num_rows, num_events in SIZES[size]:
        num_keys = max(num_events // 100, 10)
        told = f"{num_rows:,} x {num_events:,} x {num_keys:,} keys"
        say(f"(b) range join {told}")
        lake, _ = staged(Home(folder / f"join{num_rows}"), num_events, num_keys)
        build_blocks(lake, GROUP)
        no_roll_ups(lake, GROUP)
        spine = generated_spine(num_rows, num_keys)
        events = lake.scan(STAGED, columns=("note_id", "event_type", "event_ts", "known_at", "watch_ms"))
        ours, answers = timed(lambda lake=lake, spine=spine: by_compute(lake, spine), repeat)
        sql, by_the_sql = timed(lambda lake=lake, spine=spine: by_sql(lake, spine, folder), repeat)
        must_be_equal("point_in_time SQL", answers, by_the_sql)
        join, joined = timed(lambda events=events, spine=spine: by_range_join(events, spine, LIMIT_S))
        if joined is None:
            report.facts.append(f"(b) range join {told}: stopped after {join.wall_s:,.0f} s, so the ratio is a lower bound")
        else:
            must_be_equal("the range join", answers, joined)
        report.rows.append(Row("(b) compute / plain range join", told, ours, join, 8))
        report.rows.append(Row("(b) point_in_time SQL / plain range join", told, sql, join, 8))
        found.append((num_events, ours, sql, None if joined is None else join))
    if images is not None:
        lines = [
            Line("plain range join", [(events, join.cpu_s) for events, _, _, join in found if join]),
            Line("point_in_time SQL", [(events, sql.cpu_s) for events, _, sql, _ in found]),
            Line("compute", [(events, ours.cpu_s) for events, ours, _, _ in found]),
        ]
        title = "36 window features, one impression per 20 events: processor seconds"
        draw(images / "features-range-join.svg", title, "events", "s", lines)
