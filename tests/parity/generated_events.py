"""Event logs with every mess that the algebra must survive: late, early, duplicated (also with another payload), tied, null,
out of order, on a boundary, retracted (before and after, twice, in the other partition, never seen), and two log partitions,
one of which lags.

Dense on purpose: a few keys, and times on a coarse grid around a few ticks, so that reads meet the edges and do not miss them.
Hypothesis draws the seed; `random.Random` draws the rows.
"""

import json
from random import Random
from typing import Any

import pyarrow as pa

from warehouse.events import RETRACTION, TIMESTAMP
from warehouse.features.declarations import FeatureGroup
from warehouse.features.generated import START_US, asked, in_log_order, position
from warehouse.features.oracle import Read
from warehouse.time_algebra import (
    DAY_US,
    DUPLICATE_MEMORY_US,
    FIVE_MINUTES_US,
    GRACE_US,
    HOUR_US,
    MINUTE_US,
    SECOND_US,
    newest_tick,
)

CLOCKS_CHANGE_US = START_US + 66 * DAY_US + 6 * HOUR_US + 50 * MINUTE_US
"""2026-03-08 06:50 UTC: ten minutes before New York's 2 o'clock becomes 3."""
BASES_US = (0, HOUR_US, DAY_US)
EDGES_US = (0, -1, 1, SECOND_US, 2 * MINUTE_US, FIVE_MINUTES_US - 1)
DELAYS_US = (
    0,
    1,
    SECOND_US,
    GRACE_US - 1,
    GRACE_US,
    GRACE_US + 1,
    4 * MINUTE_US,
    7 * MINUTE_US,
    70 * MINUTE_US,
    26 * HOUR_US,
    -MINUTE_US,
    -8 * MINUTE_US,
)
RETRACTED_AFTER_US = (
    0,
    1,
    -1,
    SECOND_US,
    GRACE_US,
    2 * MINUTE_US,
    FIVE_MINUTES_US,
    -2 * MINUTE_US,
    -FIVE_MINUTES_US,
    HOUR_US,
    25 * HOUR_US,
    -26 * HOUR_US,
    -DUPLICATE_MEMORY_US,
    -DUPLICATE_MEMORY_US - 1,
    DUPLICATE_MEMORY_US + DAY_US,
)
"""How long after its target a retraction lands."""
EVENT_TYPES = ("view", "click", "like", "watch")
IDS = ("1", "12", "é")
"""Ids that collide when composite keys are concatenated, and one that is not ASCII."""
WINDOWS_US = (FIVE_MINUTES_US, 2 * FIVE_MINUTES_US, HOUR_US, DAY_US, 7 * DAY_US, 30 * DAY_US)


def event_log(
    random: Random, num_events: int = 80, num_retractions: int | None = None, start_us: int = START_US
) -> list[dict[str, Any]]:
    """Rows of `lake.events` with times in microseconds and the staging model's `watch_ms`, in order of landing.

    num_retractions: by default a quarter as many as there are events, which leaves no key untouched.
    """
    lag_us = random.choice((0, 3 * MINUTE_US, HOUR_US))
    rows = []
    for number in range(num_events):
        event_ts = start_us + random.choice(BASES_US) + random.randrange(4) * FIVE_MINUTES_US + random.choice(EDGES_US)
        partition = random.randrange(2)
        watch_ms = random.choice((None, -3, 0, 1, 2, 5, 2**52))
        event_type = random.choice(EVENT_TYPES)
        rows.append(
            {
                "event_id": f"e{number if random.random() < 0.7 else random.randrange(num_events)}",
                "event_type": event_type,
                "user_id": random.choice(IDS),
                "note_id": random.choice((*IDS, None)),
                "author_id": random.choice((*IDS, None)),
                "surface": None,
                "request_id": None,
                "impression_id": f"i{number if event_type == 'view' else random.randrange(num_events)}",
                "event_ts": event_ts,
                "landed_at": event_ts + random.choice(DELAYS_US) + (lag_us if partition == 1 else 0),
                "log_partition": partition,
                "landing": "log",
                "retracts": None,
                "properties": None if watch_ms is None else json.dumps({"watch_ms": watch_ms}),
                "watch_ms": watch_ms,
            }
        )
    for row in random.sample(rows, num_events // 10):  # again after the duplicate memory, and just within it
        ago = random.choice((DUPLICATE_MEMORY_US, DUPLICATE_MEMORY_US + 1))
        again = {"impression_id": f"again-{row['impression_id']}", "event_ts": row["event_ts"] + 5 * MINUTE_US + ago - DAY_US}
        rows.append({**row, **again, "landed_at": row["landed_at"] + ago})
    rows += _retractions(random, rows, num_events // 4 if num_retractions is None else num_retractions)
    return in_log_order(rows)


def _retractions(random: Random, rows: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Events that take others of `rows` back. They carry keys and values, which must count nowhere, and some take the id of an
    event, of a duplicate or of one another."""
    found = []
    for n in range(number):
        target = random.choice(rows)
        retracts = (
            target["event_id"] if random.random() < 0.9 else random.choice(("nobody", f"r{random.randrange(number)}", None))
        )
        event_id = f"r{n if random.random() < 0.8 else random.randrange(number)}"
        if random.random() < 0.1:
            event_id = random.choice(rows)["event_id"]
        landed_at = target["landed_at"] + random.choice(RETRACTED_AFTER_US)
        found.append(
            {
                **target,
                "event_id": event_id,
                "event_type": RETRACTION,
                "impression_id": None,
                "event_ts": landed_at - random.choice((0, SECOND_US, HOUR_US)),
                "landed_at": landed_at,
                "log_partition": random.randrange(2),
                "retracts": retracts,
            }
        )
    return found


def some_reads(random: Random, group: FeatureGroup, rows: list[dict[str, Any]], number: int = 40) -> list[Read]:
    """Questions whose edges fall on and beside the events, K at, before and after T."""
    questions = []
    for _ in range(number):
        key, request_us = asked(random, group, rows, WINDOWS_US, 0.2)
        tick_us = newest_tick(request_us) - random.choice((0, 0, 0, 1, 12)) * FIVE_MINUTES_US
        known_tick_us = tick_us + random.choice((0, 0, 0, -1, 1, 300)) * FIVE_MINUTES_US
        known_position = None if random.random() < 0.5 else position(random, rows, tick_us, request_us)
        questions.append(Read(key, request_us, tick_us, known_tick_us, known_position))
    return questions


def heartbeats(rows: list[dict[str, Any]], landed_at: int) -> list[dict[str, Any]]:
    """One row per partition that says: everything up to `landed_at` has been read."""
    return [
        {
            **dict.fromkeys(rows[0]),
            "event_id": f"heartbeat:{partition}:{landed_at}",
            "event_type": "heartbeat",
            "event_ts": landed_at,
            "landed_at": landed_at,
            "log_partition": partition,
            "log_offset": sum(row["log_partition"] == partition for row in rows),
            "landing": "log",
        }
        for partition in (0, 1)
    ]


def spine_table(group: FeatureGroup, questions: list[Read]) -> pa.Table:
    """The questions as the spine of a point-in-time read."""

    def times(found: list[int]) -> pa.Array:
        return pa.array(found, pa.int64()).cast(TIMESTAMP)

    return pa.table(
        {
            "row_id": pa.array(range(len(questions)), pa.int64()),
            **{key: pa.array([read.key[at] for read in questions], pa.string()) for at, key in enumerate(group.entity_keys)},
            "request_ts": times([read.request_us for read in questions]),
            "feature_watermark": times([read.tick_us for read in questions]),
            "known_at": times([read.known_tick_us for read in questions]),
            "known_position": pa.array([read.known_position for read in questions], pa.list_(pa.int64())),
        }
    )
