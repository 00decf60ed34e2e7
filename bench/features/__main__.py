"""Window features beside what a person would write by hand, or another store, in the same run on the same rows.

    python -m bench.features                    every part at sizes for two cores, some minutes
    python -m bench.features --quick            every part, small: about a minute
    python -m bench.features --full --parts d   the sizes of the targets, one part

(a) 36 window features of N impressions: `compute`, a real `dbt run` and the SQL of `point_in_time`, against a NumPy program
(b) the same values by a plain SQL range join, at growing sizes
(c) 5-minute blocks read from and written to Iceberg, against a bare DuckDB group by
(d) a last-value join against Feast's DuckDB store
(e) how the time grows with the number of events
(f) a thousand features on one machine, with the peak memory

Every ratio is peer time / our time: above 1 we are faster. Ours and the peer run in turn; the least time counts, the median and
the processor's seconds (all threads and child processes) stand beside it. Values that should agree are compared. Targets are
judged at --full.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench.features import blocks, growth, last_value, many_features, range_join, windows
from bench.features.report import Report, machine, print_report
from warehouse.home import Home

PARTS = {
    "a": windows.measure,
    "b": range_join.measure,
    "c": blocks.measure,
    "d": last_value.measure,
    "e": growth.measure,
    "f": many_features.measure,
}
PLOTTED = "be"


def run(parts: str, size: str, repeat: int, say: Callable[[str], None], images: Path | None = None) -> Report:
    report = Report(machine())
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=Home.from_env().tmp))
    try:
        for part in parts:
            here = folder / part
            here.mkdir()
            plots = {"images": images} if part in PLOTTED else {}
            PARTS[part](report, here, size, repeat, say, **plots)
            shutil.rmtree(here)
        if size != "full":
            report.rows = [replace(row, must=None) for row in report.rows]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.features", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", dest="size", action="store_const", const="quick", help="small sizes: does everything run?")
    sizes.add_argument("--full", dest="size", action="store_const", const="full", help="the targets' sizes, up to 14 GiB")
    parser.add_argument("--repeat", type=int, default=2, help="repetitions; the least time counts (default %(default)s)")
    parser.add_argument("--parts", default="".join(PARTS), help="which parts to run (default %(default)s)")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="where (b) and (e) draw their plots (default: nowhere)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(words)
    if given.repeat < 1 or not given.parts or set(given.parts) - set(PARTS):
        parser.error(f"--repeat must be at least 1 and --parts made of {', '.join(PARTS)}")
    report = run(given.parts, given.size or "default", given.repeat, lambda text: print(text, file=sys.stderr), given.plots)
    if given.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        print_report(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
