"""The online store: how long one request's features take, one tick's, and a restart, by size.

    python -m bench.online_store [--notes 100000] [--keys 1000,10000,100000] [--plot docs/images/store.svg] [--json]

1. assembly: 1 reader and 500 notes, 50 windowed features each, in two calls on one thread; beside it, in the same run and over
   the same numbers, Redis `MGET` of the 501 finished vectors, and DuckDB summing the same windows from the same blocks. All
   three must give the same numbers.
2. a tick: 50 features of all notes, assembled once, and again at the next tick with blocks of one note in a hundred, from what
   there is; then 2,000 candidates gathered.
3. state: for growing numbers of keys the bytes of blocks, the seconds to publish them and to restore a store from the files,
   checked and unchecked (another process maps them).
"""

import argparse
import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import torch

from bench.features.plot import Line, draw
from bench.redis import start_redis
from streaming_sql.assembled import Assembled
from streaming_sql.changed_keys import changed_keys
from streaming_sql.key_index import Key
from streaming_sql.online_store import AddedBlocks, OnlineStore, StoreView
from streaming_sql.pauses import settle
from streaming_sql.published import Publisher, Reading, newest_published
from warehouse.errors import HeadraceError
from warehouse.features.declarations import FeatureGroup
from warehouse.features.measures import Measure
from warehouse.time_algebra import DAY_US, FIVE_MINUTES_US, parse_window

WINDOWS = tuple(map(parse_window, ("1h", "6h", "1d", "7d", "30d")))
NUM_MEASURES = 10
CANDIDATES, GATHERED = 500, 2_000
BLOCKS_PER_KEY = 24
TICK_US = 1_651_766_400_000_000  # 2022-05-05T16:00:00Z


def group(entity: str) -> FeatureGroup:
    """50 sums over five windows."""
    settings: dict[str, Any] = dict.fromkeys(("n", "k", "q", "relative_error", "bucket_by", "empty"))
    how: dict[str, Any] = {"type": "bigint", "windows": WINDOWS, "freshness": "block", "anchor": "tick", "description": ""}
    measures = tuple(
        Measure(f"total_{number}", "sum", f"event_type = 'm{number}'", "watch_ms", **how, **settings)
        for number in range(NUM_MEASURES)
    )
    return FeatureGroup(f"{entity}_bench", entity, (f"{entity}_id",), "stg_engagements", measures, (), "bench/online_store.py")


GROUPS = {one.name: one for one in (group("note"), group("user"))}


def blocks(entity: str, num_keys: int, blocks_per_key: int = BLOCKS_PER_KEY, seed: int = 7) -> pa.Table:
    """Rows of `features.<entity>_bench`: each key in blocks_per_key blocks of the last 30 days, more of them lately."""
    rng = np.random.default_rng(seed)
    num_rows = num_keys * blocks_per_key
    age_blocks = 1 + np.floor(rng.random(num_rows) ** 3 * (30 * DAY_US // FIVE_MINUTES_US - 1)).astype(np.int64)
    start = TICK_US - age_blocks * FIVE_MINUTES_US
    stamps = {"block_start": start, "known_at": start + FIVE_MINUTES_US}
    key = np.char.add(entity[0], np.repeat(np.arange(num_keys), blocks_per_key).astype(str))
    return pa.table(
        {
            f"{entity}_id": pa.array(key, pa.string()),
            **{name: pa.array(values, pa.timestamp("us", tz="UTC")) for name, values in stamps.items()},
            "is_rebuilt": pa.array(np.zeros(num_rows, dtype=bool)),
            **{f"total_{number}": rng.integers(0, 1000, num_rows) for number in range(NUM_MEASURES)},
        }
    )


def loaded(num_notes: int, num_users: int, blocks_per_key: int = BLOCKS_PER_KEY) -> tuple[OnlineStore, dict[str, pa.Table]]:
    store = OnlineStore(GROUPS)
    rows = {"note_bench": blocks("note", num_notes, blocks_per_key), "user_bench": blocks("user", num_users, blocks_per_key, 8)}
    store.advance(store.position, {}, tick=AddedBlocks(TICK_US, rows))
    return store, rows


def next_tick(store: OnlineStore, assembled: Assembled, num_notes: int) -> dict[str, Any]:
    """What a tick costs that brings a block of one note in a hundred, from what is assembled and from nothing."""
    before, started_us = store.view(), store.tick_us
    rows = blocks("note", num_notes // 100, 1, 9)
    for name, instant_us in (("block_start", started_us), ("known_at", started_us + FIVE_MINUTES_US)):
        instants = pa.array(np.full(rows.num_rows, instant_us), pa.timestamp("us", tz="UTC"))
        rows = rows.set_column(rows.column_names.index(name), name, instants)
    store.advance(store.position, {}, tick=AddedBlocks(started_us + FIVE_MINUTES_US, {"note_bench": rows}))
    view, whole = store.view(), Assembled(store.plans, {("note_id",): [(f"n{note}",) for note in range(num_notes)]})
    seconds = {}
    for name, one in (("moved_s", assembled), ("whole_s", whole)):
        started = time.perf_counter()
        one.assemble(view)
        seconds[name] = time.perf_counter() - started
    found, expected = assembled.matrix(view, "note_bench"), whole.matrix(view, "note_bench")
    assert found is not None
    assert expected is not None
    _same("moving to the next tick", found.values, expected.values)
    return {**seconds, "num_changed": len(changed_keys(before, view, "note_bench") or ())}


def timings_ms(work: Callable[[int], Any], times: int) -> dict[str, float]:
    """p50 and p99 of calls with growing numbers; the first tenth warms up."""
    spent = []
    for number in range(times + times // 10):
        started = time.perf_counter()
        work(number)
        spent.append((time.perf_counter() - started) * 1000)
    p50, p99 = np.percentile(spent[times // 10 :], [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


def assembly(num_notes: int, folder: Path) -> dict[str, Any]:
    """One request's features by the three ways, and what a tick costs."""
    num_users = 1_000
    store, rows = loaded(num_notes, num_users)
    view = store.view()
    rng = np.random.default_rng(1)
    asked = [[(f"n{note}",) for note in rng.integers(0, num_notes, CANDIDATES)] for _ in range(64)]

    def ours(number: int) -> np.ndarray:
        user = view.assemble("user_bench", [(f"u{number % num_users}",)], TICK_US)
        return np.concatenate([user.values, view.assemble("note_bench", asked[number % 64], TICK_US).values])

    settle()
    result: dict[str, Any] = {"ours": timings_ms(ours, 2_000)}
    assembled = Assembled(store.plans, {("note_id",): [(f"n{note}",) for note in range(num_notes)]})
    started = time.perf_counter()
    assembled.assemble(view)
    result["tick_s"] = time.perf_counter() - started
    candidates = [rng.integers(0, num_notes, GATHERED) for _ in range(64)]

    def key_of(place: int) -> Key:
        raise HeadraceError(f"candidate {place} is not held")

    def gather(number: int) -> np.ndarray | None:
        rows = assembled.gather(view, "note_bench", candidates[number % 64], key_of, TICK_US)
        return rows.matrix().values if rows else None

    keys = [(f"n{note}",) for note in candidates[0]]
    _same("gathering", gather(0), view.assemble("note_bench", keys, TICK_US).values)
    result["gather"] = timings_ms(gather, 2_000)
    result["next_tick"] = next_tick(store, assembled, num_notes)

    with contextlib.ExitStack() as stack:
        redis = start_redis(folder, stack)
        if redis is not None:
            for name, entity, num_keys in (("note_bench", "n", num_notes), ("user_bench", "u", num_users)):
                for first in range(0, num_keys, 5_000):
                    keys = [f"{entity}{one}" for one in range(first, min(first + 5_000, num_keys))]
                    vectors = view.assemble(name, [(key,) for key in keys], TICK_US).values
                    redis.mset({key.encode(): row.tobytes() for key, row in zip(keys, vectors, strict=True)})

            def by_redis(number: int) -> np.ndarray:
                keys = [f"u{number % num_users}".encode(), *(key.encode() for (key,) in asked[number % 64])]
                return np.frombuffer(b"".join(redis.mget(keys)), np.float64).reshape(len(keys), -1)

            _same("Redis", by_redis(3), ours(3))
            result["redis MGET of finished vectors"] = timings_ms(by_redis, 2_000)

    connection = duckdb.connect(config={"threads": 1})
    for entity in ("note", "user"):
        connection.register("given", rows[f"{entity}_bench"])
        connection.execute(f"create table {entity} as select * from given order by {entity}_id, block_start")
    sums = ", ".join(
        f"coalesce(sum(total_{number}) filter (where block_start >= make_timestamptz({TICK_US - window.length_us})), 0)"
        for number in range(NUM_MEASURES)
        for window in WINDOWS
    )
    queries = {
        entity: f"select {entity}_id, {sums} from {entity} where {entity}_id in (select unnest(?)) group by all"
        for entity in ("note", "user")
    }

    def by_duckdb(number: int) -> np.ndarray:
        parts = []
        for entity, keys in (("user", [f"u{number % num_users}"]), ("note", [key for (key,) in asked[number % 64]])):
            found = connection.execute(queries[entity], [keys]).to_arrow_table()
            at = {key: row for row, key in enumerate(found[f"{entity}_id"].to_pylist())}
            columns = np.stack([column.cast(pa.float64()).to_numpy() for column in found.columns[1:]], axis=1)
            parts.append(columns[[at[key] for key in keys]])
        return np.concatenate(parts)

    _same("DuckDB", by_duckdb(3), ours(3))
    result["duckdb query over the blocks"] = timings_ms(by_duckdb, 30)
    return result | {"num_notes": num_notes, "num_features": 50, "num_candidates": CANDIDATES, "num_gathered": GATHERED}


def _same(who: str, found: np.ndarray | None, expected: np.ndarray) -> None:
    if found is None or not np.array_equal(found, expected):
        raise HeadraceError(f"{who} gives other numbers; the timings mean nothing")


def state(num_keys: int, folder: Path) -> dict[str, Any]:
    """Size, publishing and restoring of a store of num_keys notes with 8 blocks each."""
    store, _ = loaded(num_keys, 1, 8)
    view, publisher = store.view(), Publisher(folder, GROUPS)

    def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
        started = time.perf_counter()
        found = work()
        return time.perf_counter() - started, found

    publish_s, _ = seconds(lambda: publisher.publish(view, {}))
    published = newest_published(folder)
    assert published is not None
    restore_s, restored = seconds(lambda: Reading(GROUPS).view(published))
    some = [(f"n{note}",) for note in range(0, num_keys, max(num_keys // 1000, 1))]
    _same("the restored store", _values(restored, some), _values(view, some))
    size = sum(store.num_bytes().values())
    return {
        "num_keys": num_keys,
        "block_mb": size / 1e6,
        "file_mb": publisher.num_bytes_written / 1e6,
        "publish_s": publish_s,
        "restore_s": restore_s,
    }


def _values(view: StoreView, keys: list[tuple[str]]) -> np.ndarray:
    return view.assemble("note_bench", keys, TICK_US).values


def as_text(result: dict[str, Any]) -> str:
    """The result in a few lines."""
    one = result["assembly"]
    lines = [result["machine"], f"assembly    1 reader + {CANDIDATES} notes × 50 features, of {one['num_notes']:,} notes"]
    for name in ("ours", "redis MGET of finished vectors", "duckdb query over the blocks"):
        if name in one:
            lines.append(f"            {name:<32} p50 {one[name]['p50_ms']:.2f} ms, p99 {one[name]['p99_ms']:.2f} ms")
    lines.append(f"tick        {one['num_notes']:,} notes × 50 features assembled in {one['tick_s']:.2f} s")
    moved = one["next_tick"]
    lines.append(
        f"next tick   {moved['num_changed']:,} of them changed: {moved['moved_s'] * 1000:.1f} ms, "
        f"{moved['whole_s'] / moved['moved_s']:.1f} times less than all anew ({moved['whole_s'] * 1000:.0f} ms)"
    )
    gather = one["gather"]
    lines.append(f"gather      {GATHERED:,} candidates: p50 {gather['p50_ms']:.3f} ms, p99 {gather['p99_ms']:.3f} ms")
    for size in result["state"]:
        lines.append(
            f"state       {size['num_keys']:>9,} keys: blocks {size['block_mb']:.1f} MB, files {size['file_mb']:.1f} MB; "
            f"publish {size['publish_s']:.2f} s, restore {size['restore_s']:.2f} s"
        )
    return "\n".join(lines)


def plot(path: Path, sizes: list[dict[str, Any]]) -> None:
    """State size and restore time against the number of keys."""
    lines = [
        Line(name, [(size["num_keys"], size[field]) for size in sizes])
        for name, field in (("blocks, MB", "block_mb"), ("publish, s", "publish_s"), ("restore, s", "restore_s"))
    ]
    draw(path, "Online store: size and restart by number of keys (8 blocks each)", "keys", "MB or s", lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Assembly, ticks, state size and restore time of the online store.")
    parser.add_argument("--notes", type=int, default=100_000, help="notes of the assembly part (default %(default)s)")
    parser.add_argument("--keys", default="1000,10000,100000", help="sizes of the state part (default %(default)s)")
    parser.add_argument("--plot", type=Path, help="draw the state part here (SVG)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    sizes = [int(size) for size in given.keys.split(",")]
    if given.notes < GATHERED or min(sizes) < 1:
        parser.error(f"--notes must be at least {GATHERED}, --keys positive")
    torch.set_num_threads(1)
    load = " ".join(f"{one:.1f}" for one in os.getloadavg())
    machine = f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}"
    result: dict[str, Any] = {"machine": f"{machine}, load average {load} at the start"}
    try:
        with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
            result["assembly"] = assembly(given.notes, Path(folder))
        result["state"] = []
        for size in sizes:
            with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
                result["state"].append(state(size, Path(folder)))
    except HeadraceError as error:
        parser.exit(2, f"{error}\n")
    if given.plot:
        plot(given.plot, result["state"])
    print(json.dumps(result) if given.json else as_text(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
