"""Window features beside programs that a person would write by hand, in the same run on the same rows.

    python -m bench.features               about a minute on two cores
    python -m bench.features --full        the sizes of the targets: 1 M impressions, 10 M events, 100 k keys

(a) 36 window features (6 measures x 6 windows to 30 days) for N impressions: `point_in_time` (the SQL that dbt runs) and
    `compute` from Iceberg blocks, against a NumPy program of prefix sums and searchsorted over the events. The program knows
    nothing of late events: how many of its values leak is counted.
(b) the same values by a plain SQL range join, at growing sizes.
(c) 5-minute blocks read from and written to Iceberg, against a bare DuckDB group by in memory. Removing duplicates is timed
    apart.

Every ratio is peer time / our time: above 1 we are faster. Times are the least of the repetitions; processor seconds (all
threads) stand beside them, because they hold on a machine that others use too.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from warehouse.events import TIMESTAMP
from warehouse.features.compute import computed_chunks
from warehouse.features.compute_engine import Relations
from warehouse.features.compute_plan import plan
from warehouse.features.compute_spine import Spine
from warehouse.features.declarations import FeatureGroup
from warehouse.features.measures import Measure
from warehouse.features.render import block_sql, point_in_time_sql, retractions_sql, roll_up_sql, staging_sql
from warehouse.home import Home
from warehouse.lake import BUILT_UNTIL, Lake
from warehouse.time_algebra import DAY_US, FIVE_MINUTES_US, GRACE_US, HOUR_US, MINUTE_US, parse_window

START_US = 1_767_225_600_000_000
"""2026-01-01 00:00 UTC."""
DAYS = 30
SHARE_LATE = 0.01
TYPES = ("view", "click", "like", "comment", "share", "watch")
TYPE_SHARES = (0.55, 0.2, 0.08, 0.04, 0.03, 0.1)
WINDOWS = ("1h", "6h", "1d", "3d", "7d", "30d")
COUNTED = TYPES[:5]
SIZES = {
    "default": (100_000, 1_000_000, 20_000),
    "half": (500_000, 5_000_000, 50_000),
    "full": (1_000_000, 10_000_000, 100_000),
}
JOIN_SIZES = {
    "default": ((5_000, 50_000), (10_000, 100_000), (20_000, 200_000)),
    "half": ((12_500, 250_000), (25_000, 500_000), (50_000, 1_000_000)),
    "full": ((25_000, 500_000), (50_000, 1_000_000), (100_000, 2_000_000)),
}


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock on the wall, and by the processor over all threads."""

    wall_s: float
    cpu_s: float

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)


@dataclass
class Row:
    """One comparison of ours with a peer; a ratio is peer / ours."""

    what: str
    size: str
    ours: Spent
    peer: Spent
    must: float | None = None

    @property
    def ratio(self) -> float:
        return self.peer.wall_s / self.ours.wall_s

    @property
    def cpu_ratio(self) -> float:
        return self.peer.cpu_s / max(self.ours.cpu_s, 1e-9)


@dataclass
class Report:
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    built: tuple[Spent, Spent] | None = None
    """What the 5-minute blocks took, and hours and days."""

    def as_json(self) -> dict[str, Any]:
        rows = [{**asdict(row), "ratio": round(row.ratio, 3), "cpu_ratio": round(row.cpu_ratio, 3)} for row in self.rows]
        return {"machine": self.machine, "facts": self.facts, "rows": rows}


def bench_group() -> FeatureGroup:
    """Six measures with six windows each: five counts and a sum."""
    windows = tuple(parse_window(name) for name in WINDOWS)

    def measure(name: str, aggregation: str, where: str | None, of: str | None) -> Measure:
        return Measure(name, aggregation, where, of, "bigint", None, windows, "block", "tick", "")

    counts = [measure(f"num_{kind}s", "count", f"event_type = '{kind}'", None) for kind in COUNTED]
    measures = (*counts, measure("total_watch_ms", "sum", None, "watch_ms"))
    return FeatureGroup("bench_notes", "note", ("note_id",), "stg_engagements", measures, (), "bench/features.py")


GROUP = bench_group()


def generated_log(num_events: int, num_keys: int, seed: int = 7) -> pa.Table:
    """Rows of `lake.events`: keys skewed (a few notes draw most events), one event in a hundred minutes to hours late."""
    rng = np.random.default_rng(seed)
    chance = 1 / (np.arange(num_keys) + 20.0)
    key = np.searchsorted(np.cumsum(chance) / chance.sum(), rng.random(num_events))
    event_us = np.sort(START_US + rng.integers(0, DAYS * DAY_US, num_events))
    late = rng.random(num_events) < SHARE_LATE
    delay_us = np.where(late, rng.exponential(2 * HOUR_US, num_events), rng.integers(0, 5_000_000, num_events)).astype(np.int64)
    landed_us = event_us + delay_us
    order = np.argsort(landed_us, kind="stable")
    kind = rng.choice(len(TYPES), num_events, p=TYPE_SHARES)
    columns = pa.table({"key": key[order], "kind": kind[order], "event_us": event_us[order], "landed_us": landed_us[order]})
    watch_ms = pa.array(rng.integers(0, 60_000, num_events))
    with duckdb.connect() as connection:
        connection.execute("set TimeZone = 'UTC'")
        connection.register("drawn", columns.append_column("watch", watch_ms))
        return connection.execute(
            f"""
            select
                'e' || log_offset as event_id,
                {list(TYPES)}[kind + 1] as event_type,
                'n' || key as note_id,
                make_timestamptz(event_us) as event_ts,
                make_timestamptz(landed_us) as landed_at,
                0::integer as log_partition,
                log_offset,
                case when kind = {len(TYPES) - 1} then '{{"watch_ms": ' || watch || '}}' end as properties,
                null::varchar as user_id, null::varchar as author_id, null::varchar as surface, null::varchar as request_id,
                null::varchar as impression_id,
                null::varchar as retracts
            from (select *, row_number() over () - 1 as log_offset from drawn)
            """
        ).to_arrow_table()


def generated_spine(num_rows: int, num_keys: int, seed: int = 8) -> pa.Table:
    """Impressions of the same skewed notes, at any time of the 30 days."""
    rng = np.random.default_rng(seed)
    chance = 1 / (np.arange(num_keys) + 20.0)
    key = np.searchsorted(np.cumsum(chance) / chance.sum(), rng.random(num_rows))
    request_us = np.sort(START_US + HOUR_US + rng.integers(0, DAYS * DAY_US - 2 * HOUR_US, num_rows))
    return pa.table(
        {
            "impression_id": pa.array(np.arange(num_rows)),
            "note_id": pc.binary_join_element_wise("n", pa.array(key).cast(pa.string()), ""),
            "request_ts": pa.array(request_us).cast(TIMESTAMP),
        }
    )


def build_lake(home: Home, log: pa.Table, repeat: int, report: Report | None, size: str) -> Lake:
    """Staged events and blocks in Iceberg, by the macros that dbt runs; the timings of (c) on the way."""
    lake = Lake.open(home)
    until = datetime.fromtimestamp((START_US + (DAYS + 2) * DAY_US) / 1_000_000, UTC).isoformat()

    def store(name: str, rows: pa.Table) -> None:
        if lake.exists(name):
            lake.catalogue.drop_table(name)
        table = lake.create(name, rows.schema, {"known_at": "day"})
        with table.transaction() as transaction:
            transaction.append(rows)
            transaction.set_properties({BUILT_UNTIL: until})

    def select(sql: str) -> pa.Table:
        with lake.duckdb() as connection:
            return connection.execute(sql).to_arrow_table()

    with duckdb.connect() as connection:
        connection.execute("set TimeZone = 'UTC'")
        connection.register("log", log)
        dedup, staged = timed(lambda: connection.execute(staging_sql("log")).to_arrow_table(), 1)
        store("staging.stg_engagements", staged)
        shadowed = staged.slice(0, 0).append_column("retracts", pa.array([], pa.string()))
        shadowed = shadowed.append_column("shadowed_by", pa.array([], pa.list_(pa.int64())))
        store("staging.stg_shadowed_arrivals", shadowed)
        names = Relations.of(GROUP)
        store(names.retractions, connection.execute(retractions_sql("log")).to_arrow_table())
        retracted = "staging.stg_retracted_events"
        store(retracted, staged.slice(0, 0).append_column("retracted_at", pa.array([], staged["known_at"].type)))

        def build_blocks() -> None:
            store(names.blocks, select(block_sql(GROUP, names.events, retracted)))

        ours, _ = timed(build_blocks, repeat)
        connection.execute("create table events as select note_id, event_type, event_ts, watch_ms from staged")
        counts = ", ".join(f"count(*) filter (where event_type = '{kind}')" for kind in COUNTED)
        peer, _ = timed(
            lambda: connection.execute(
                "create or replace table grouped as select note_id, time_bucket(interval 5 minutes, event_ts), "
                f"{counts}, sum(watch_ms) from events group by all"
            ),
            repeat,
        )

    def roll_up() -> None:
        store(names.hours, select(roll_up_sql(GROUP, names.blocks, 60)))
        store(names.days, select(roll_up_sql(GROUP, names.hours, 1440)))

    rolled, _ = timed(roll_up, 1)
    if report is not None:
        report.rows.append(Row("(c) 5-minute blocks, Iceberg read and write / bare DuckDB group by", size, ours, peer, 0.3))
        report.built = ours, rolled
        report.facts |= {
            "blocks": lake.scan(names.blocks, columns=("known_at",)).num_rows,
            "remove duplicates, s": round(dedup.wall_s, 2),
            "blocks, s": round(ours.wall_s, 2),
            "hours and days, s": round(rolled.wall_s, 2),
        }
    return lake


def by_compute(lake: Lake, spine: pa.Table) -> pa.Table:
    checked = Spine(spine, "the spine")
    return pa.concat_tables(computed_chunks(lake, checked, plan({GROUP.name: GROUP}, spine.column_names, None), None))


def by_sql(lake: Lake, spine: pa.Table, spill: Path) -> pa.Table:
    """The SQL that dbt runs for a training set, over Iceberg."""
    with lake.duckdb() as connection:
        connection.execute(f"set temp_directory = '{spill}'")
        connection.register("given", spine)
        connection.execute(
            "create temp table spine as select impression_id as row_id, note_id, request_ts, "
            f"make_timestamptz((epoch_us(request_ts) - {GRACE_US}) // {FIVE_MINUTES_US} * {FIVE_MINUTES_US}) "
            "as feature_watermark, feature_watermark as known_at, null::bigint[] as known_position from given"
        )
        sql = point_in_time_sql(GROUP, "spine", **asdict(Relations.of(GROUP)))
        return connection.execute(f"select * from ({sql}) as answers order by row_id").to_arrow_table()


def by_numpy(events: Path, spine: pa.Table) -> dict[str, np.ndarray]:
    """What a careful person writes by hand: events sorted by (key, time), prefix sums, one binary search per window edge.

    Windows are cut at the same ticks as ours; an event counts as soon as it happened, however late it landed.
    """
    rows = pq.read_table(events)
    encoded = rows["note_id"].combine_chunks().dictionary_encode()
    key = encoded.indices.to_numpy().astype(np.int64)
    order_key = key << 32 | (rows["event_ts"].cast(pa.int64()).to_numpy() - START_US) // 1_000_000
    order = np.argsort(order_key)
    sorted_keys = order_key[order]
    kind = rows["event_type"].combine_chunks().dictionary_encode()
    names = kind.dictionary.to_pylist()
    kinds = kind.indices.to_numpy()[order]
    prefix = np.zeros((len(order) + 1, len(COUNTED) + 1), np.int64)
    for at, name in enumerate(COUNTED):
        np.cumsum(kinds == names.index(name), out=prefix[1:, at])
    np.cumsum(rows["watch_ms"].fill_null(0).to_numpy()[order], out=prefix[1:, -1])

    found = pc.fill_null(pc.index_in(spine["note_id"], value_set=encoded.dictionary), -1).to_numpy().astype(np.int64)
    request_us = spine["request_ts"].cast(pa.int64()).to_numpy()
    tick_s = ((request_us - GRACE_US) // FIVE_MINUTES_US * FIVE_MINUTES_US - START_US) // 1_000_000
    by_key = np.argsort(found << 32 | tick_s)  # neighbouring reads touch neighbouring rows
    found, tick_s = found[by_key], tick_s[by_key]
    at_upper = prefix[np.where(found < 0, 0, np.searchsorted(sorted_keys, np.maximum(found, 0) << 32 | np.maximum(tick_s, 0)))]
    columns = {}
    for name in WINDOWS:
        lower_s = np.maximum(tick_s - parse_window(name).length_us // 1_000_000, 0)
        at_lower = prefix[np.where(found < 0, 0, np.searchsorted(sorted_keys, np.maximum(found, 0) << 32 | lower_s))]
        total = np.empty_like(at_upper)
        total[by_key] = at_upper - at_lower
        for at, measure in enumerate(GROUP.measures):
            columns[f"note_{measure.name}_{name}"] = np.ascontiguousarray(total[:, at])
    return columns


def by_range_join(events: pa.Table, spine: pa.Table) -> pa.Table:
    """One join on key and time, one filtered aggregate per feature: exact, and the plain way to say it in SQL."""
    items = []
    for measure in GROUP.measures:
        for window in measure.windows:
            condition = f"event_ts >= tick - interval {window.length_us // MINUTE_US} minute"
            of = f"count(*) filter (where {measure.where} and {condition})"
            if measure.of:
                of = f"cast(coalesce(sum({measure.of}) filter (where {condition}), 0) as bigint)"
            items.append(f"{of} as note_{measure.name}_{window.name}")
    with duckdb.connect() as connection:
        connection.execute("set TimeZone = 'UTC'")
        connection.register("events_given", events)
        connection.register("spine_given", spine)
        connection.execute("create table events as select * from events_given")
        connection.execute(
            "create table spine as select impression_id, note_id, make_timestamptz((epoch_us(request_ts) - "
            f"{GRACE_US}) // {FIVE_MINUTES_US} * {FIVE_MINUTES_US}) as tick from spine_given"
        )
        return connection.execute(
            f"select impression_id, {', '.join(items)} from spine left join events on spine.note_id = events.note_id "
            "and event_ts >= tick - interval 30 day and event_ts < tick and known_at <= tick "
            "group by impression_id order by impression_id"
        ).to_arrow_table()


def timed(call: Callable[[], Any], repeat: int) -> tuple[Spent, Any]:
    """(least time of `repeat` calls, the last answer)."""
    spent = []
    answer = None
    for _ in range(repeat):
        del answer
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        answer = call()
        spent.append(Spent(time.perf_counter() - wall_s, time.process_time() - cpu_s))
    return Spent(min(one.wall_s for one in spent), min(one.cpu_s for one in spent)), answer


def same_values(ours: pa.Table, other: Any) -> tuple[int, int]:
    """(values, how many are equal) over all features."""
    total = equal = 0
    for name in GROUP.feature_names:
        left = ours[name].to_numpy()
        right = other[name] if isinstance(other, dict) else other[name].to_numpy()
        total += len(left)
        equal += int((left == right).sum())
    return total, equal


def must_be_equal(what: str, ours: pa.Table, other: Any) -> None:
    total, equal = same_values(ours, other)
    if total != equal:
        raise SystemExit(f"{what}: {total - equal:,} of {total:,} values differ from compute; the timings mean nothing")


def run(size: str, repeat: int, parts: str, say: Callable[[str], None]) -> Report:
    report = Report(
        {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "load": [round(load, 1) for load in os.getloadavg()],
            "python": platform.python_version(),
            "duckdb": duckdb.__version__,
            "numpy": np.__version__,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        }
    )
    folder = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
    try:
        if "a" in parts or "c" in parts:
            _windows(report, folder, size, repeat, "a" in parts, say)
        if "b" in parts:
            for num_rows, num_events in JOIN_SIZES[size]:
                _range_join(report, folder / f"join{num_rows}", num_rows, num_events, repeat, say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _windows(report: Report, folder: Path, size: str, repeat: int, reads: bool, say: Callable[[str], None]) -> None:
    num_rows, num_events, num_keys = SIZES[size]
    told = f"{num_rows:,} x {num_events:,} x {num_keys:,} keys"
    say(f"generating {told}")
    log = generated_log(num_events, num_keys)
    say("building blocks")
    lake = build_lake(Home(folder / "home"), log, repeat, report, f"{num_events:,} events")
    del log
    if not reads:
        return
    with lake.duckdb() as connection:
        connection.execute(
            "copy (select note_id, event_type, event_ts, watch_ms from staging.stg_engagements) "
            f"to '{folder / 'events.parquet'}'"
        )
    spine = generated_spine(num_rows, num_keys)
    say("compute")
    compute, ours = timed(lambda: by_compute(lake, spine), repeat)
    say("NumPy by hand")
    numpy, by_hand = timed(lambda: by_numpy(folder / "events.parquet", spine), repeat)
    total, equal = same_values(ours, by_hand)
    del by_hand
    say("point_in_time SQL")
    sql, answers = timed(lambda: by_sql(lake, spine, folder), max(repeat - 1, 1))
    must_be_equal("point_in_time SQL", ours, answers)
    assert report.built is not None
    blocks, rolled = report.built
    report.rows += [
        Row("(a) compute / NumPy by hand", told, compute, numpy, 1 / 1.5),
        Row("(a) dbt SQL / NumPy by hand", told, sql, numpy, 1 / 3.5),
        Row("(a) compute with building the 5-minute blocks / NumPy by hand", told, compute + blocks, numpy),
        Row("(a) dbt SQL with building all blocks / NumPy by hand", told, sql + blocks + rolled, numpy),
    ]
    report.facts["values"] = total
    report.facts["values where NumPy by hand saw events before they landed"] = total - equal


def _range_join(report: Report, folder: Path, num_rows: int, num_events: int, repeat: int, say: Callable[[str], None]) -> None:
    num_keys = max(num_events // 100, 10)
    told = f"{num_rows:,} x {num_events:,} x {num_keys:,} keys"
    say(f"range join {told}")
    lake = build_lake(Home(folder), generated_log(num_events, num_keys), 1, None, told)
    spine = generated_spine(num_rows, num_keys)
    events = lake.scan("staging.stg_engagements", columns=("note_id", "event_type", "event_ts", "known_at", "watch_ms"))
    compute, ours = timed(lambda: by_compute(lake, spine), repeat)
    sql, answers = timed(lambda: by_sql(lake, spine, folder), repeat)
    must_be_equal("point_in_time SQL", ours, answers)
    join, joined = timed(lambda: by_range_join(events, spine), 1)
    must_be_equal("the range join", ours, joined)
    report.rows += [
        Row("(b) compute / plain range join", told, compute, join, 8),
        Row("(b) dbt SQL / plain range join", told, sql, join, 8),
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _print(report: Report) -> None:
    print(", ".join(f"{name} {value}" for name, value in report.machine.items()))
    print(", ".join(f"{name} {value:,}" for name, value in report.facts.items()))
    width = max(len(row.what) for row in report.rows)
    sizes = max(len(row.size) for row in report.rows)
    print(f"{'ours / peer':<{width}}  {'size':<{sizes}}  {'ours s':>8}  {'peer s':>8}  {'ratio':>7}  {'by cpu':>7}  must")
    for row in report.rows:
        must = "" if row.must is None else f"{row.must:.2f} {'met' if row.ratio >= row.must else 'MISSED'}"
        times = f"{row.ours.wall_s:8.2f}  {row.peer.wall_s:8.2f}  {row.ratio:6.2f}x  {row.cpu_ratio:6.2f}x"
        print(f"{row.what:<{width}}  {row.size:<{sizes}}  {times}  {must}")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.features",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--full", dest="size", action="store_const", const="full", help="1 M x 10 M x 100 k (about 12 GB of memory)"
    )
    sizes.add_argument("--half", dest="size", action="store_const", const="half", help="500 k x 5 M x 50 k")
    parser.add_argument("--repeat", type=int, default=2, help="repetitions; the least time counts (default %(default)s)")
    parser.add_argument("--parts", default="abc", help="which of a, b, c to run (default %(default)s)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(words)
    if given.repeat < 1 or not given.parts or set(given.parts) - set("abc"):
        parser.error("--repeat must be at least 1 and --parts made of a, b and c")
    report = run(given.size or "default", given.repeat, given.parts, lambda text: print(text, file=sys.stderr))
    if given.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        _print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
