"""What a worker that follows costs beside one that makes its own blocks: a tick's processor time, and memory.

    python -m bench.followers [--events 1000000] [--per-tick 6000] [--ticks 12] [--json]

Three processes read the same made-up log. One leads: it makes ticks and publishes them. One follows: it takes them. One starts
from the files of the first tick, as the one that follows does, and then makes ticks alone. All must give the same values.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from streaming_sql.event_log import Position
from streaming_sql.feed import REMEMBERED, Feed
from streaming_sql.online_store import OnlineStore, StoreView
from streaming_sql.pauses import settle
from streaming_sql.published import Publisher, Reading, newest_published
from streaming_sql.published_ticks import PublishedTicks
from warehouse.errors import HeadraceError
from warehouse.events import EVENTS_SCHEMA, NUM_PARTITIONS
from warehouse.features.declarations import load_groups
from warehouse.time_algebra import DAY_US, FIVE_MINUTES_US, MINUTE_US, floor_5m

START_US = floor_5m(1_651_766_400_000_000)
NOTES, AUTHORS, USERS = 100_000, 10_000, 30_000
HISTORY_US = 3 * DAY_US
PIECE = 100_000
TYPES = ("view", "click", "watch", "like")
COMPARED = 500


def main() -> int:
    parser = argparse.ArgumentParser(description="A tick in a process that follows and in one that makes its own.")
    parser.add_argument("--events", type=int, default=1_000_000, help="before the first tick (default %(default)s)")
    parser.add_argument("--per-tick", type=int, default=6_000, help="events of a tick (default %(default)s)")
    parser.add_argument("--ticks", type=int, default=12, help="that are timed (default %(default)s)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.events < 1000 or given.per_tick < 1 or given.ticks < 1:
        parser.error("--events must be at least 1000, --per-tick and --ticks at least 1")
    load = " ".join(f"{one:.1f}" for one in os.getloadavg())
    machine = f"{os.cpu_count()} CPUs, {platform.machine()}, load average {load} at the start"
    try:
        result = {"machine": machine, **measured(given.events, given.per_tick, given.ticks)}
    except HeadraceError as error:
        parser.exit(2, f"{error}\n")
    print(json.dumps(result) if given.json else as_text(result))
    return 0


def measured(num_events: int, per_tick: int, ticks: int) -> dict[str, Any]:
    """What each process says; HeadraceError if they give different values."""
    processes = get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        ours, theirs = zip(*(processes.Pipe() for _ in ROLES), strict=True)
        children = [
            processes.Process(target=work, args=(pipe, Path(folder), num_events, per_tick), daemon=True)
            for work, pipe in zip(ROLES.values(), theirs, strict=True)
        ]
        for child, its_end in zip(children, theirs, strict=True):
            child.start()
            its_end.close()  # held by the child alone, so that the pipe breaks where it dies
        spent: list[list[float]] = [[] for _ in ROLES]
        try:
            for tick in range(ticks + 1):
                for place, pipe in enumerate(ours):  # in turn: the leader publishes, then the others read
                    pipe.send(tick)
                    spent[place].append(pipe.recv())
            told = []
            for pipe in ours:
                pipe.send(None)
                told.append(pipe.recv())
        except (EOFError, OSError) as error:
            for child in children:
                child.terminate()
            raise HeadraceError("one of the processes ended before it had answered; see above") from error
        for child in children:
            child.join()
    values = [one.pop("values") for one in told]
    if not all(np.array_equal(values[0][i], one[i], equal_nan=True) for one in values[1:] for i in range(len(one))):
        raise HeadraceError("the processes give different values; the timings mean nothing")
    return {
        name: {"tick_ms": 1000 * statistics.median(seconds[1:]), "start_s": seconds[0], **one}
        for name, seconds, one in zip(ROLES, spent, told, strict=True)
    }


def leads(pipe: Connection, folder: Path, num_events: int, per_tick: int) -> None:
    groups = load_groups()
    store = OnlineStore(groups)
    feed, publisher = Feed(store, groups, (0,) * NUM_PARTITIONS, _NothingRetracted()), Publisher(folder, groups)
    before = memory()
    while (tick := pipe.recv()) is not None:
        pieces = history(num_events) if tick == 0 else [events_of(tick, per_tick)]
        began = time.thread_time()
        for piece in pieces:
            feed.take(piece)
        spent = time.thread_time() - began
        publisher.publish(store.view(), {})
        pipe.send(spent)
    pipe.send(_told(store, before))


def follows(pipe: Connection, folder: Path, num_events: int, per_tick: int) -> None:
    groups = load_groups()
    store, ticks = OnlineStore(groups), PublishedTicks(folder, groups)
    feed, before = Feed(store, groups, (0,) * NUM_PARTITIONS, _NothingRetracted(), elsewhere=ticks), memory()
    while (tick := pipe.recv()) is not None:
        pieces = history(num_events) if tick == 0 else [events_of(tick, per_tick)]
        began = time.thread_time()
        ticks.look()
        if tick == 0 and (published := ticks.take(START_US + DAY_US)) is not None:
            store.advance(store.position, {}, tick=published)
        _read(feed, pieces, is_history=tick == 0)
        pipe.send(time.thread_time() - began)
    pipe.send(_told(store, before))


def alone(pipe: Connection, folder: Path, num_events: int, per_tick: int) -> None:
    """Starts from the same files, then makes its own ticks."""
    groups, before = load_groups(), memory()
    while (tick := pipe.recv()) is not None:
        pieces = history(num_events) if tick == 0 else [events_of(tick, per_tick)]
        began = time.thread_time()
        if tick == 0:
            published = newest_published(folder)
            assert published is not None
            view = Reading(groups).view(published)
            store = OnlineStore.of_blocks(view, view.position)
            feed = Feed(store, groups, (0,) * NUM_PARTITIONS, _NothingRetracted())
        _read(feed, pieces, is_history=tick == 0)
        pipe.send(time.thread_time() - began)
    pipe.send(_told(store, before))


def _read(feed: Feed, pieces: Sequence[pa.Table], is_history: bool) -> None:
    """As a process does that starts: the ids of seven days first, then what its tick may not hold."""
    for piece in pieces[:-1]:
        feed.remember(piece.select(REMEMBERED))
    feed.take(pieces[-1], is_history=is_history)


ROLES = {"leads": leads, "follows": follows, "alone": alone}


class _NothingRetracted:
    """The history that a feed asks about retracted events."""

    def around(self, event_ids: Iterable[str], keys: Sequence[tuple[str, ...]], position: Position, since_us: int) -> pa.Table:
        return EVENTS_SCHEMA.empty_table()


def history(num_events: int) -> list[pa.Table]:
    """Events of HISTORY_US up to the first tick."""
    num_pieces = -(-num_events // PIECE)
    span_us = HISTORY_US // num_pieces
    return [_events(f"h{i}", -(num_pieces - i) * span_us, span_us, num_events // num_pieces, i) for i in range(num_pieces)]


def events_of(tick: int, per_tick: int) -> pa.Table:
    return _events(f"t{tick}", (tick - 1) * FIVE_MINUTES_US, FIVE_MINUTES_US, per_tick, 1_000_000 + tick)


def _events(name: str, after_us: int, span_us: int, count: int, number: int) -> pa.Table:
    """Events in order of landing, half of a partition each; both are read past the span's end plus the grace."""
    rng = np.random.default_rng(number)
    landed = START_US + after_us + 2 * MINUTE_US + np.sort(rng.integers(0, span_us, count))
    landed[-2:] = START_US + after_us + 2 * MINUTE_US + span_us
    note = np.minimum(rng.zipf(1.2, count), NOTES) * 7919 % NOTES
    place = np.arange(count)
    first = number * PIECE  # offsets only have to grow
    nothing = pa.nulls(count, pa.string())
    return pa.table(
        {
            "event_id": pa.array([f"{name}-{i}" for i in range(count)]),
            "event_type": pa.array(np.array(TYPES)[rng.integers(0, len(TYPES), count)]),
            "user_id": pa.array([f"u{user}" for user in rng.integers(0, USERS, count)]),
            "note_id": pa.array([f"n{one}" for one in note]),
            "author_id": pa.array([f"a{one % AUTHORS}" for one in note]),
            "surface": nothing,
            "request_id": nothing,
            "impression_id": nothing,
            "event_ts": pa.array(landed),
            "landed_at": pa.array(landed),
            "log_partition": pa.array(place % NUM_PARTITIONS, pa.int32()),
            "log_offset": pa.array(first + place // NUM_PARTITIONS),
            "landing": pa.array(["log"] * count),
            "retracts": nothing,
            "properties": nothing,
        }
    ).cast(EVENTS_SCHEMA)


def memory() -> dict[str, float]:
    """MB of this process: private and written (nobody shares it), mapped from files, and its share of everything."""
    settle()
    pa.default_memory_pool().release_unused()
    kb = {line.split()[0]: int(line.split()[1]) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]}
    anonymous = kb["Anonymous:"]
    return {"anonymous_mb": anonymous / 1e3, "file_mb": (kb["Rss:"] - anonymous) / 1e3, "pss_mb": kb["Pss:"] / 1e3}


def _told(store: OnlineStore, before: dict[str, float]) -> dict[str, Any]:
    after, view = memory(), store.view()
    return {
        **{name: after[name] - before[name] for name in after},
        "block_mb": sum(store.num_bytes().values()) / 1e6,
        "num_keys": sum(store.num_keys().values()),
        "values": _values(view),
    }


def _values(view: StoreView) -> list[np.ndarray]:
    """Of some keys of each group, the event-fresh ones too."""
    t_us = view.tick_us + 4 * MINUTE_US
    named = {"user_id": "u", "note_id": "n", "author_id": "a"}
    found = []
    for name, state in view.groups.items():
        keys = [tuple(f"{named[key]}{i}" for key in state.plan.group.entity_keys) for i in range(COMPARED)]
        found.append(view.assemble(name, keys, t_us).values)
    return found


def as_text(result: dict[str, Any]) -> str:
    lines = [result["machine"], "         a tick   start    anonymous     files       Pss  (MB more than before)   keys"]
    for name in ROLES:
        one = result[name]
        lines.append(
            f"{name:8} {one['tick_ms']:5.0f} ms {one['start_s']:5.2f} s {one['anonymous_mb']:9.0f} {one['file_mb']:9.0f} "
            f"{one['pss_mb']:9.0f} {one['num_keys']:29,}"
        )
    lines.append(f"blocks {result['leads']['block_mb']:.0f} MB; processor time of the thread that feeds")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
