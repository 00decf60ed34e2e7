"""The stream: replay of real clicks into blocks and store, durable ingest, and how soon an event is seen.

    python -m bench.stream [--events 100000 | --full] [--json]

1. replay: Globo.com clicks from the log to blocks and online store, in the clicks' own time; every value of every key must
   equal that of a store loaded from a batch build of the same events.
2. ingest: batches of 500, each durable before the next; beside it, in the same run and on the same disk, a bare SQLite insert
   (WAL, synchronous=full), a file append with fsync, and Redis streams (appendfsync always) where `redis-server` is on the
   PATH.
3. end to end: 2,000 events a second by an open loop for some seconds, from the instant an event was due to be posted to the
   answer of a store read that counts it.

Ratios are ours / peer in events per second: above 1 we are faster. Needs $HEADRACE_DATA/globo; the licence allows academic use.
"""

import argparse
import contextlib
import json
import os
import platform
import queue
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bench.redis import DURABLE, Redis, start_redis
from streaming_sql.event_log import EventLog
from streaming_sql.feed import Feed
from streaming_sql.history import LakeAndLog
from streaming_sql.lander import Lander, LanderSettings
from streaming_sql.online_store import OnlineStore
from streaming_sql.pauses import settle
from streaming_sql.runner import Runner, RunnerSettings
from warehouse.clock import Clock, ManualClock
from warehouse.errors import HeadraceError
from warehouse.features.declarations import FeatureGroup, load_groups
from warehouse.features.render import block_sql, retracted_sql, retractions_sql, staging_sql
from warehouse.home import Home, data_root
from warehouse.lake import BUILT_UNTIL, Lake
from warehouse.landing import create_tables
from warehouse.time_algebra import FIVE_MINUTES_US, MINUTE_US

BATCH = 500
READ = 10_000
CLICKS_IN_ALL = 2_988_181


def main() -> int:
    parser = argparse.ArgumentParser(description="Replay, durable ingest and end-to-end delay of the stream.")
    parser.add_argument("--events", type=int, default=100_000, help="clicks to replay (default %(default)s)")
    parser.add_argument("--full", action="store_true", help=f"replay all {CLICKS_IN_ALL:,} clicks")
    parser.add_argument("--ingest", type=int, default=40_000, help="events of the ingest part (default %(default)s)")
    parser.add_argument("--rate", type=int, default=2_000, help="events a second, end to end (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of the end-to-end part (default %(default)s)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.events < BATCH or given.ingest < BATCH or not 100 <= given.rate <= 20_000 or not 1 <= given.seconds <= 600:
        parser.error(f"--events and --ingest must be at least {BATCH}, --rate 100 to 20000, --seconds 1 to 600")
    groups = load_groups()
    result: dict[str, Any] = {"machine": _machine()}
    try:
        clicks = _clicks(None if given.full else given.events)
        with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
            result["replay"] = replay(Home(Path(folder) / "replay"), groups, clicks)
        with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
            result["ingest"] = ingest(Path(folder), given.ingest)
        with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
            result["end_to_end"] = end_to_end(Home(Path(folder)), groups, given.rate, given.seconds)
    except HeadraceError as error:
        parser.exit(2, f"{error}\n")
    print(json.dumps(result) if given.json else as_text(result))
    return 0 if result["replay"]["num_different"] == 0 else 1


def _machine() -> str:
    load = " ".join(f"{one:.1f}" for one in os.getloadavg())
    return f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}, load average {load} at the start"


def _clicks(num_clicks: int | None) -> pa.Table:
    file = data_root() / "globo" / "clicks.parquet"
    if not file.exists():
        raise HeadraceError(f"no {file}; point HEADRACE_DATA at the folder that holds globo/")
    clicks = pq.read_table(file, columns=["user_id", "click_article_id", "click_timestamp"]).sort_by("click_timestamp")
    return clicks if num_clicks is None else clicks.slice(0, num_clicks)


def _batches(clicks: pa.Table) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(instant of the last click in microseconds, events) for every BATCH clicks."""
    number = 0
    for start in range(0, clicks.num_rows, BATCH):
        rows = clicks.slice(start, BATCH).to_pylist()
        events = [
            {
                "event_id": f"click-{number + i}",
                "event_type": "click",
                "user_id": f"u{row['user_id']}",
                "note_id": f"n{row['click_article_id']}",
                "event_ts": row["click_timestamp"] * 1000,
            }
            for i, row in enumerate(rows)
        ]
        number += len(rows)
        yield rows[-1]["click_timestamp"] * 1000, events


def replay(home: Home, groups: dict[str, FeatureGroup], clicks: pa.Table) -> dict[str, Any]:
    """Log → blocks → store, then the same from a batch build; counts the values that differ."""
    clock = ManualClock(clicks["click_timestamp"][0].as_py() * 1000)
    lake = Lake.open(home)
    create_tables(lake)
    with contextlib.closing(EventLog.open(home.log, clock=clock)) as log:
        append_s = time.perf_counter()
        for now_us, events in _batches(clicks):
            clock.advance_us(max(now_us - clock.now_us(), 0))
            log.append(events)
        append_s = time.perf_counter() - append_s
        clock.advance_us(FIVE_MINUTES_US + MINUTE_US)
        log.heartbeat()
        store, totals = OnlineStore(groups), [0, 0]
        feed = Feed(store, groups, (0,) * log.num_partitions, LakeAndLog(lake, log))
        read_s = time.perf_counter()
        while (records := log.read(feed.position, READ)).num_rows:
            taken = feed.take(records)
            totals[0] += taken.num_events
            totals[1] += taken.closed_tick_us is not None
        read_s = time.perf_counter() - read_s
        landed_s = time.perf_counter()
        Lander(lake, log, clock, LanderSettings(rows=200_000)).flush()
        landed_s = time.perf_counter() - landed_s
    build_s = time.perf_counter()
    _build(lake, groups, store.tick_us)
    build_s = time.perf_counter() - build_s
    loaded = OnlineStore.from_lake(lake, groups)
    num_values, num_different = _compare(store, loaded, groups, clicks, clock.now_us())
    return {
        "num_events": totals[0],
        "num_advances": totals[1],
        "append_per_s": clicks.num_rows / append_s,
        "feed_per_s": totals[0] / read_s,
        "land_per_s": clicks.num_rows / landed_s,
        "batch_build_s": build_s,
        "block_mb": sum(store.num_bytes().values()) / 1e6,
        "num_values": num_values,
        "num_different": num_different,
    }


def _build(lake: Lake, groups: dict[str, FeatureGroup], tick_us: int) -> None:
    """The blocks of every tick up to tick_us by the macros that dbt uses, over what has landed."""
    with lake.duckdb() as connection:
        connection.execute(f"create temp table staged as {staging_sql('lake.events')}")
        connection.execute(f"create temp table retractions as {retractions_sql('lake.events')}")
        connection.execute(f"create temp table retracted as {retracted_sql('staged', 'retractions')}")
        for name, group in groups.items():
            sql = f"select * from ({block_sql(group, 'staged', 'retracted')}) where known_at <= make_timestamptz({tick_us})"
            rows = connection.execute(sql).to_arrow_table()
            lake.create(f"features.{name}", rows.schema)
            until = datetime.fromtimestamp((tick_us + FIVE_MINUTES_US) / 1e6, UTC).isoformat()
            with lake.transaction(f"features.{name}") as transaction:
                transaction.append(rows)
                transaction.set_properties({BUILT_UNTIL: until})


def _compare(
    own: OnlineStore, other: OnlineStore, groups: dict[str, FeatureGroup], clicks: pa.Table, t_us: int
) -> tuple[int, int]:
    """(values compared, values that differ) over every user and article."""
    if own.tick_us != other.tick_us:
        raise HeadraceError(f"the replay ended at tick {own.tick_us}, the batch build at {other.tick_us}")
    users = [(f"u{one}",) for one in pc.unique(clicks["user_id"]).to_pylist()]
    notes = [(f"n{one}",) for one in pc.unique(clicks["click_article_id"]).to_pylist()]
    num_values = num_different = num_counted = 0
    for name, group in groups.items():
        keys = {("user_id",): users, ("note_id",): notes}.get(tuple(group.keys), [])
        for start in range(0, len(keys), READ):
            some = keys[start : start + READ]
            a, b = (one.view().assemble(name, some, t_us) for one in (own, other))
            same = (a.values == b.values) | (np.isnan(a.values) & np.isnan(b.values))
            num_counted += int(np.nansum(a.values) > 0)
            num_values += same.size + sum(map(len, a.sequences.values()))
            num_different += int((~same).sum())
            num_different += sum(x != y for s in a.sequences for x, y in zip(a.sequences[s], b.sequences[s], strict=True))
    if not num_counted:
        raise HeadraceError("the replay ended with nothing in any window")
    return num_values, num_different


def ingest(folder: Path, num_events: int) -> dict[str, Any]:
    """Events per second of each way to keep batches of BATCH durably."""
    batches = [
        [
            {
                "event_id": f"e{start + i}",
                "event_type": "click",
                "user_id": f"u{(start + i) * 7919 % 5000}",
                "note_id": f"n{(start + i) % 3000}",
                "event_ts": 1_651_766_400_000_000 + start + i,
            }
            for i in range(BATCH)
        ]
        for start in range(0, num_events, BATCH)
    ]
    log = EventLog.open(folder / "log")
    rates = {"ours": _rate(log.append, batches), "sqlite insert": _rate(_sqlite(folder / "bare.db"), batches)}
    assert sum(log.end()) == len(batches) * BATCH
    log.close()
    with open(folder / "events.ndjson", "ab", buffering=0) as file:
        rates["file append + fsync"] = _rate(lambda events: _append(file, events), batches)
    with contextlib.ExitStack() as stack:
        redis = start_redis(folder, stack, DURABLE)
        if redis is not None:
            rates["redis stream"] = _rate(lambda events: _add(redis, events), batches)
    return {"events_per_s": rates, "ratio": {name: rates["ours"] / rate for name, rate in rates.items() if name != "ours"}}


def _add(redis: Redis, events: list[dict[str, Any]]) -> None:
    """XADD in a pipeline."""
    told = [(one["event_id"].encode(), json.dumps(one).encode()) for one in events]
    redis.pipeline([(b"XADD", b"events", b"*", b"event_id", event_id, b"event", event) for event_id, event in told])


def _rate(keep: Callable[[list[dict[str, Any]]], Any], batches: list[list[dict[str, Any]]]) -> float:
    started = time.perf_counter()
    for events in batches:
        keep(events)
    return len(batches) * BATCH / (time.perf_counter() - started)


def _sqlite(path: Path) -> Callable[[list[dict[str, Any]]], None]:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = full")
    connection.execute("create table events (event_id text primary key, event text) without rowid")

    def keep(events: list[dict[str, Any]]) -> None:
        connection.execute("begin immediate")
        connection.executemany("insert into events values (?, ?)", [(one["event_id"], json.dumps(one)) for one in events])
        connection.execute("commit")

    return keep


def _append(file: Any, events: list[dict[str, Any]]) -> None:
    file.write("".join(json.dumps(one) + "\n" for one in events).encode())
    os.fsync(file.fileno())


def end_to_end(home: Home, groups: dict[str, FeatureGroup], rate: int, seconds: float) -> dict[str, Any]:
    """Milliseconds from the instant an event was due until a store read has counted it; one event of each post is watched."""
    lake = Lake.open(home)
    create_tables(lake)
    clock = Clock()
    log = EventLog.open(home.log, clock=clock)
    runner = Runner(lake, log, OnlineStore(groups), groups, clock, RunnerSettings(poll_seconds=0.001))
    runner.catch_up()
    settle()
    runner.start()
    posts: queue.Queue[tuple[float, list[dict[str, Any]]] | None] = queue.Queue()
    watched: queue.Queue[tuple[float, str, tuple[int, int]] | None] = queue.Queue()
    per_post = max(rate // 100, 1)

    def post() -> None:
        while (item := posts.get()) is not None:
            due, events = item
            now_us = clock.now_us()
            positions = log.append([event | {"event_ts": now_us} for event in events])
            watched.put((due, events[0]["user_id"], positions[0]))
        watched.put(None)

    delays_ms: list[float] = []

    def watch() -> None:
        while (item := watched.get()) is not None:
            due, user_id, (partition, offset) = item
            wanted = tuple(offset + 1 if p == partition else 0 for p in range(log.num_partitions))
            if not runner.wait_until(wanted, 60):
                raise HeadraceError("an event was not seen within a minute")
            matrix = runner.store.view().assemble("user_activity", [(user_id,)], clock.now_us() + 1)
            if matrix.values[0, matrix.names.index("user_num_clicks_5m")] != 1:
                raise HeadraceError(f"the click of {user_id} was acknowledged and read past, and does not count")
            delays_ms.append((time.perf_counter() - due) * 1000)

    threads = [threading.Thread(target=work) for work in (post, watch)]
    for thread in threads:
        thread.start()
    started = time.perf_counter()
    num_posts = int(seconds * rate / per_post)
    for number in range(num_posts):
        due = started + number * per_post / rate
        time.sleep(max(due - time.perf_counter(), 0))
        kinds = [
            {"event_id": f"w{number}", "event_type": "click", "user_id": f"watched{number}", "note_id": f"n{number % 500}"}
        ]
        kinds += [
            {"event_id": f"p{number}-{i}", "event_type": "view", "user_id": f"u{i * number % 5000}", "note_id": f"n{i}"}
            for i in range(1, per_post)
        ]
        posts.put((due, kinds))
    posts.put(None)
    for thread in threads:
        thread.join()
    runner.stop(flush=False)
    log.close()
    if len(delays_ms) != num_posts:
        raise HeadraceError(f"{num_posts} events were watched, {len(delays_ms)} were seen")
    p50, p99 = np.percentile(delays_ms, [50, 99])
    return {"rate": rate, "num_watched": num_posts, "p50_ms": float(p50), "p99_ms": float(p99), "max_ms": max(delays_ms)}


def as_text(result: dict[str, Any]) -> str:
    replayed, kept, seen = result["replay"], result["ingest"], result["end_to_end"]
    lines = [
        result["machine"],
        f"replay      {replayed['num_events']:,} clicks: log → blocks → store {replayed['feed_per_s']:,.0f} events/s in "
        f"{replayed['num_advances']} advances; into the log {replayed['append_per_s']:,.0f}/s, log → lake "
        f"{replayed['land_per_s']:,.0f}/s; blocks {replayed['block_mb']:.1f} MB",
        f"            {replayed['num_values']:,} values of all users and articles beside a batch build "
        f"({replayed['batch_build_s']:.1f} s): {replayed['num_different']} differ",
        f"ingest      batches of {BATCH}, every one durable",
    ]
    for name, rate in kept["events_per_s"].items():
        ratio = "" if name == "ours" else f"   ours / peer {kept['ratio'][name]:.2f}×"
        lines.append(f"            {name:<20} {rate:>10,.0f} events/s{ratio}")
    lines.append(
        f"end to end  {seen['rate']:,} events/s, {seen['num_watched']} watched: p50 {seen['p50_ms']:.1f} ms, "
        f"p99 {seen['p99_ms']:.1f} ms, max {seen['max_ms']:.1f} ms"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
