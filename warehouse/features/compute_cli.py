"""`headrace features compute`: a spine in, the same rows with features out, or one sentence and nothing written."""

import argparse
import errno
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from warehouse.errors import HeadraceError
from warehouse.features.compute import computed_chunks
from warehouse.features.compute_plan import Plan, plan
from warehouse.features.compute_spine import REQUEST_TS, Spine, spool_csv, spool_sql
from warehouse.features.declarations import load_groups
from warehouse.features.kinds.declared import load_kinds
from warehouse.home import Home
from warehouse.lake import Lake


def main(words: Sequence[str]) -> int:
    """Runs `features compute WORDS`."""
    parser = argparse.ArgumentParser(
        prog="headrace features compute",
        description=f"Adds features to every row of a spine: key columns and {REQUEST_TS} (with a zone), each at its own time.",
        epilog="examples:\n  headrace features compute --spine spine.parquet --out features.parquet\n"
        "  headrace features compute --spine spine.csv --out out.parquet --features note_ctr_1d,note_num_views_6h\n"
        '  headrace features compute --spine-sql "select note_id, event_ts as request_ts from staging.stg_engagements\n'
        "    where event_type = 'view'\" --out out.parquet",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    spine = parser.add_mutually_exclusive_group(required=True)
    spine.add_argument("--spine", type=Path, metavar="FILE", help="a file ending in .parquet or .csv")
    spine.add_argument("--spine-sql", metavar="SELECT", help="one select over the lake")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the Parquet file to write")
    parser.add_argument("--features", metavar="A,B", help="which features, in this order (default: all that the keys allow)")
    parser.add_argument("--known-at", metavar="COLUMN", help="K of block-fresh features, a tick (default: the row's own T)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    given = parser.parse_args(words)
    started = time.perf_counter()
    names = None if given.features is None else [name.strip() for name in given.features.split(",") if name.strip()]
    num_rows, what = compute_file(Home.from_env(), given.spine or given.spine_sql, given.out, names, given.known_at)
    seconds = time.perf_counter() - started
    if given.json:
        told = {"out": str(given.out), "num_rows": num_rows, "features": what.features, "left_out": what.left_out}
        print(json.dumps({**told, "seconds": round(seconds, 3)}))
        return 0
    print(f"{num_rows:,} rows with {len(what.features)} features in {given.out} ({seconds:.1f} s)")
    if what.left_out:
        print(f"left out, because the spine lacks their keys: {', '.join(what.left_out)}")
    return 0


def compute_file(
    home: Home, source: Path | str, out: Path, features: Sequence[str] | None = None, known_at: str | None = None
) -> tuple[int, Plan]:
    """Computes features for a Parquet or CSV file (a Path), or a select over the lake (text), into a Parquet file.

    The spine is read and the result written chunk by chunk. `out` appears whole or not at all. Returns the number of rows and
    what was computed. Raises HeadraceError for bad input.
    """
    _check_paths(source, out)
    groups, kinds = load_groups(), load_kinds()
    lake = Lake.open(home)
    spooled = home.tmp / f"spine.{os.getpid()}.parquet"
    unfinished = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        if isinstance(source, str):
            spool_sql(lake, source, spooled)
            spine = Spine(spooled, "the spine")
        elif source.suffix == ".csv":
            keys = dict.fromkeys(key for group in groups.values() for key in group.entity_keys)
            keys |= dict.fromkeys(key for table in kinds.tables for key in table.keys)
            spool_csv(source, tuple(keys), (REQUEST_TS, *([known_at] if known_at else [])), spooled)
            spine = Spine(spooled, str(source))
        else:
            spine = Spine(source, str(source))
        what = plan(groups, spine.schema.names, features, kinds)
        return _write(lake, spine, what, known_at, out, unfinished), what
    except (duckdb.IOException, duckdb.InvalidInputException, OSError) as error:  # Arrow's readers raise the last
        raise HeadraceError(f"a file of the lake is damaged or gone: {str(error).splitlines()[0]}") from error
    finally:
        spooled.unlink(missing_ok=True)
        unfinished.unlink(missing_ok=True)


def _check_paths(source: Path | str, out: Path) -> None:
    if out.suffix != ".parquet":
        raise HeadraceError(f"--out must end in .parquet, got {out}")
    if not out.parent.is_dir():
        raise HeadraceError(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir():
        raise HeadraceError(f"--out {out} is a folder; name a file")
    if isinstance(source, str):
        return
    if source.suffix not in (".parquet", ".csv"):
        raise HeadraceError(f"--spine must end in .parquet or .csv, got {source}")
    if not source.is_file():
        raise HeadraceError(f"no file {source}")
    if out.exists() and out.samefile(source):
        raise HeadraceError(f"--out {out} is the spine itself; name another file")


def _write(lake: Lake, spine: Spine, what: Plan, known_at: str | None, out: Path, unfinished: Path) -> int:
    num_rows = 0
    chunks = computed_chunks(lake, spine, what, known_at)
    first = next(chunks)  # bad input is refused here, before there is a file
    problem = None
    try:
        with pq.ParquetWriter(unfinished, first.schema, compression="zstd") as writer:
            chunk: pa.Table | None = first
            while chunk is not None:
                writer.write_table(chunk)
                num_rows += chunk.num_rows
                chunk = next(chunks, None)
        os.replace(unfinished, out)
    except OSError as error:
        problem = f"{out} cannot be written: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = f"no space is left on the disk of {out.parent}; {out} was not written"
    if problem:  # raised out here, or it would be taken for the home's disk being full
        raise HeadraceError(problem)
    return num_rows
