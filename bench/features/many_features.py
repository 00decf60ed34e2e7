"""(f) 1,008 features (84 measures x 12 windows) on one machine: seconds, and the peak memory of building and of reading."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bench.features.child import in_child
from bench.features.declared import MANY_WINDOWS, many
from bench.features.lakes import build_blocks, generated_spine, no_roll_ups, num_rows, staged
from bench.features.ours import compute_chunks
from bench.features.report import Report
from bench.features.timing import Spent, timed
from warehouse.features.compute_source import Relations
from warehouse.home import Home
from warehouse.lake import Lake

SIZES = {
    "quick": (2_000, 20_000, 500, 84),
    "default": (100_000, 1_000_000, 20_000, 84),
    "full": (500_000, 5_000_000, 50_000, 84),
}
MOST_GIB = 16


def measure(report: Report, folder: Path, size: str, repeat: int, say: Callable[[str], None]) -> None:
    num_impressions, num_events, num_keys, num_measures = SIZES[size]
    say(f"(f) {num_measures * len(MANY_WINDOWS):,} features of {num_impressions:,} impressions x {num_events:,} events")
    home = folder / "many"
    (build, block_rows), built_gib = in_child(_build, home, num_events, num_keys, num_measures)
    (compute, size_bytes), peak_gib = in_child(_compute, home, num_impressions, num_keys, num_measures)
    verdict = "met" if max(built_gib, peak_gib) <= MOST_GIB else "MISSED"
    report.facts.append(
        f"(f) {num_measures * len(MANY_WINDOWS):,} features, {num_impressions:,} impressions x {num_events:,} events "
        f"({block_rows:,} block rows): blocks {build.wall_s:.1f} s ({build.cpu_s:.1f} cpu), peak {built_gib:.1f} GiB; "
        f"compute to a Parquet file of {size_bytes / 2**20:,.0f} MiB {compute.wall_s:.1f} s ({compute.cpu_s:.1f} cpu), "
        f"peak {peak_gib:.1f} GiB; must be within {MOST_GIB} GiB: {verdict}"
    )


def _build(home: Path, num_events: int, num_keys: int, num_measures: int) -> tuple[Spent, int]:
    lake, _ = staged(Home(home), num_events, num_keys)
    group = many(num_measures)
    spent, _ = timed(lambda: build_blocks(lake, group, max(32 * 1_000_000 // num_events, 1)))
    no_roll_ups(lake, group)
    return spent, num_rows(lake, Relations.of(group).blocks)


def _compute(home: Path, num_impressions: int, num_keys: int, num_measures: int) -> tuple[Spent, int]:
    lake, spine, group = Lake.open(Home(home)), generated_spine(num_impressions, num_keys), many(num_measures)
    out = home / "out.parquet"

    def compute() -> None:
        writer = None
        for chunk in compute_chunks(lake, spine, group):
            writer = writer or pq.ParquetWriter(out, chunk.schema, compression="zstd", compression_level=1)
            writer.write_table(chunk)
        assert writer is not None
        writer.close()

    spent, _ = timed(compute)
    _check_nesting(out)
    return spent, out.stat().st_size


def _check_nesting(out: Path) -> None:
    """A count over a longer window is never less, and not all are nothing."""
    names = [f"note_num_views_0_{window}" for window in MANY_WINDOWS]
    rows: pa.Table = pq.read_table(out, columns=names)
    for shorter, longer in pairwise(names):
        if (rows[shorter].to_numpy() > rows[longer].to_numpy()).any():
            raise SystemExit(f"(f) {shorter} is more than {longer}; the timings mean nothing")
    if not rows[names[-1]].to_numpy().any():
        raise SystemExit("(f) all features are empty; the timings mean nothing")
