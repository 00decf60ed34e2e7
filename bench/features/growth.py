"""(e) How the time of `compute` grows with the events: one impression per ten events, one key per hundred, 36 features."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.features.child import in_child
from bench.features.declared import GROUP
from bench.features.lakes import EVENTS_AT_ONCE, build_blocks, generated_spine, no_roll_ups, num_rows, staged
from bench.features.ours import compute_chunks
from bench.features.plot import Line, draw
from bench.features.report import Report
from bench.features.timing import Spent, timed
from warehouse.features.compute_source import Relations
from warehouse.home import Home
from warehouse.lake import Lake

SIZES = {
    "quick": (100_000, 200_000, 400_000),
    "default": (1_000_000, 2_000_000, 5_000_000),
    "full": (1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000),
}


def measure(
    report: Report, folder: Path, size: str, repeat: int, say: Callable[[str], None], images: Path | None = None
) -> None:
    events, compute_s, build_s = [], [], []
    for num_events in SIZES[size]:
        say(f"(e) {num_events:,} events")
        home = folder / f"growth{num_events}"
        (build, block_rows), built_gib = in_child(_build, home, num_events)
        (compute, values), peak_gib = in_child(_compute, home, num_events, repeat)
        events.append(num_events)
        compute_s.append(compute.cpu_s)
        build_s.append(build.cpu_s)
        report.facts.append(
            f"(e) {num_events:>11,} events, {block_rows:,} block rows: blocks {build.wall_s:.1f} s ({build.cpu_s:.1f} cpu, "
            f"{built_gib:.1f} GiB), compute {compute.wall_s:.1f} s ({compute.cpu_s:.1f} cpu, {peak_gib:.1f} GiB), "
            f"{values:,} values"
        )
    for name, seconds in (("compute", compute_s), ("blocks", build_s)):
        slope, base = np.polyfit(events, seconds, 1)
        fitted = np.polyval((slope, base), events)
        spread = 1 - np.sum((np.array(seconds) - fitted) ** 2) / np.sum((np.array(seconds) - np.mean(seconds)) ** 2)
        power = np.polyfit(np.log(events), np.log(seconds), 1)[0]
        report.facts.append(
            f"(e) {name}: {base:.2f} s + {slope * 1e6:.2f} s of processor time per million events (R2 {spread:.4f}); "
            f"as a power of the events: {power:.2f}"
        )
    if images is not None:
        lines = [
            Line("blocks", list(zip(events, build_s, strict=True))),
            Line("compute", list(zip(events, compute_s, strict=True))),
        ]
        draw(
            images / "features-growth.svg",
            "36 window features, one impression per 10 events: processor s",
            "events",
            "s",
            lines,
        )


def _build(home: Path, num_events: int) -> tuple[Spent, int]:
    lake, _ = staged(Home(home), num_events, num_events // 100)
    days_at_once = max(32 * EVENTS_AT_ONCE // num_events, 1)
    spent, _ = timed(lambda: build_blocks(lake, GROUP, min(days_at_once, 32)))
    no_roll_ups(lake, GROUP)
    return spent, num_rows(lake, Relations.of(GROUP).blocks)


def _compute(home: Path, num_events: int, repeat: int) -> tuple[Spent, int]:
    """The answers are taken chunk by chunk and dropped, as a writer would."""
    lake, spine = Lake.open(Home(home)), generated_spine(num_events // 10, num_events // 100)

    def compute() -> int:
        return sum(chunk.num_rows * len(GROUP.feature_names) for chunk in compute_chunks(lake, spine, GROUP))

    return timed(compute, repeat)
