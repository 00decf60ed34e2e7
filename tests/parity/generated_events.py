"""Event logs with every mess that the algebra must survive: late, early, duplicated (also with another payload), tied, null, out of
order, on a boundary, and two log partitions, one of which lags.

Times sit on a coarse grid around a few ticks, so that hypothesis finds edges instead of missing them.
"""

import json
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from warehouse.events import EVENT_TYPES, EVENTS_SCHEMA
from warehouse.time_algebra import DAY_US, DUPLICATE_MEMORY_US, FIVE_MINUTES_US, GRACE_US, HOUR_US, MINUTE_US, SECOND_US

START_US = 1_767_225_600_000_000  # 2026-01-01 00:00 UTC
EDGES_US = (0, -1, 1, SECOND_US, GRACE_US, GRACE_US - 1, GRACE_US + 1, 2 * MINUTE_US, FIVE_MINUTES_US - 1)
DELAYS_US = (0, 1, SECOND_US, GRACE_US - 1, GRACE_US, GRACE_US + 1, 4 * MINUTE_US, 7 * MINUTE_US, 70 * MINUTE_US, 26 * HOUR_US, -MINUTE_US, -8 * MINUTE_US)
IDS = ("1", "12", "é", "")
"""Ids that collide when composite keys are concatenated, and one that is not ASCII."""


@st.composite
def instants(draw: st.DrawFn, days: int = 9) -> int:
    """An instant near a 5-minute boundary, most often near the same few."""
    base = draw(st.sampled_from((0, HOUR_US, DAY_US, DAY_US + HOUR_US, 7 * DAY_US, days * DAY_US)))
    return START_US + base + draw(st.integers(0, 4)) * FIVE_MINUTES_US + draw(st.sampled_from(EDGES_US))


@st.composite
def event_logs(draw: st.DrawFn, max_events: int = 40) -> list[dict[str, Any]]:
    """Rows of `lake.events` with times in microseconds and the staging model's `watch_ms`, in order of landing."""
    raw = draw(
        st.lists(
            st.tuples(
                instants(),
                st.sampled_from(DELAYS_US),
                st.sampled_from(EVENT_TYPES),
                st.sampled_from(IDS),
                st.sampled_from((*IDS, None)),
                st.sampled_from((*IDS, None)),
                st.one_of(st.none(), st.integers(-3, 5), st.just(2**52)),
                st.integers(0, 1),
                st.integers(0, 60),
            ),
            max_size=max_events,
        )
    )
    lag_us = draw(st.sampled_from((0, 3 * MINUTE_US, HOUR_US)))
    arrivals = []
    for number, (event_ts, delay, event_type, user_id, note_id, author_id, watch_ms, partition, reused) in enumerate(raw):
        arrivals.append(
            {
                "event_id": f"e{reused if reused < len(raw) else number}",
                "event_type": event_type,
                "user_id": user_id,
                "note_id": note_id,
                "author_id": author_id,
                "impression_id": None,
                "surface": None,
                "request_id": None,
                "event_ts": event_ts,
                "landed_at": max(event_ts + delay, event_ts - 9 * MINUTE_US) + (lag_us if partition == 1 else 0),
                "log_partition": partition,
                "watch_ms": watch_ms,
                "properties": None if watch_ms is None else json.dumps({"watch_ms": watch_ms}),
                "landing": "log",
                "retracts": None,
            }
        )
    arrivals = [row for row in arrivals if row["landed_at"] - row["event_ts"] <= DUPLICATE_MEMORY_US]
    arrivals.sort(key=lambda row: row["landed_at"])
    next_offset = [0, 0]
    for row in arrivals:
        row["log_offset"] = next_offset[row["log_partition"]]
        next_offset[row["log_partition"]] += 1
    return arrivals


def as_table(rows: list[dict[str, Any]]) -> pa.Table:
    """The rows as an Arrow table in the schema of `lake.events`."""
    columns = {field.name: pa.array([row[field.name] for row in rows], pa.int64() if pa.types.is_timestamp(field.type) else field.type) for field in EVENTS_SCHEMA}
    return pa.table(columns).cast(EVENTS_SCHEMA)
