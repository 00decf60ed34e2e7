"""Generated event logs: late, early, dead, duplicated, retracted, tied, null, on edges, with heartbeats, in two partitions."""

import re
from pathlib import Path

import duckdb
import orjson
import pyarrow as pa
from hypothesis import strategies as st

from streaming_sql.history import around, asked, below_sql, oldest_landing_us
from streaming_sql.records import to_table
from warehouse.events import EVENTS_SCHEMA
from warehouse.features.declarations import load_groups
from warehouse.time_algebra import (
    DAY_US,
    DUPLICATE_MEMORY_US,
    FIVE_MINUTES_US,
    FURTHEST_AHEAD_US,
    HOUR_US,
    MINUTE_US,
    SECOND_US,
)

START_US = 1_651_766_400_000_000  # 2022-05-05T16:00:00Z
USERS, NOTES, AUTHORS = ["u1", "u2", None], ["n1", "n2", None], ["a1", "a2", None]
EVERYTHING = Path(__file__).parent.parent / "parity" / "every_aggregation"
GROUPS = {**load_groups(), **load_groups(EVERYTHING)}
WATCH = [None, "5", 5, -3, 0, 2**40, "x", True]

# how far before its arrival an event happened: mostly just now, sometimes late, dead, early or on the very edge
AGES_US = st.one_of(
    st.sampled_from([0, 1, SECOND_US, FIVE_MINUTES_US, -SECOND_US, -FURTHEST_AHEAD_US, -FURTHEST_AHEAD_US - 1]),
    st.sampled_from([DUPLICATE_MEMORY_US, DUPLICATE_MEMORY_US + 1, HOUR_US, 6 * HOUR_US, DAY_US]),
    st.integers(-MINUTE_US, 20 * MINUTE_US),
)
STEPS_US = st.one_of(
    st.sampled_from([0, 0, 1, SECOND_US, 30 * SECOND_US, FIVE_MINUTES_US, 65 * MINUTE_US, DAY_US]),
    st.integers(0, 4 * MINUTE_US),
)


@st.composite
def logs(draw, max_size=40):
    """Records in EVENTS_SCHEMA by (landed_at, partition, offset), as a list of dicts with instants in microseconds."""
    now_us, offsets, records = START_US, [draw(st.integers(0, 5)), 0], []
    for number in range(draw(st.integers(1, max_size))):
        now_us += draw(STEPS_US)
        partition = draw(st.integers(0, 1))
        event_ts = now_us - draw(AGES_US)
        if draw(st.booleans()):
            event_ts = event_ts // FIVE_MINUTES_US * FIVE_MINUTES_US  # on an edge, and often tied
        watch = draw(st.sampled_from(WATCH))
        event_id = f"e{number}" if draw(st.integers(0, 4)) else f"e{draw(st.integers(0, number))}"
        event_type = draw(
            st.sampled_from(["view", "click", "click", "long_view", "like", "watch", "heartbeat", "retraction", "retraction"])
        )
        records.append(
            {
                "event_id": event_id,
                "event_type": event_type,
                "retracts": f"e{draw(st.integers(max(0, number - 6), number + 2))}" if event_type == "retraction" else None,
                "user_id": draw(st.sampled_from(USERS)),
                "note_id": draw(st.sampled_from(NOTES)),
                "author_id": draw(st.sampled_from(AUTHORS)),
                "event_ts": event_ts,
                "landed_at": now_us,
                "log_partition": partition,
                "log_offset": offsets[partition],
                "landing": "log",
                "properties": None if draw(st.integers(0, 3)) == 0 else orjson.dumps({"watch_ms": watch}).decode(),
            }
        )
        offsets[partition] += 1
    return records


class ListHistory:
    """A history over records in memory: the lake and the log of a test."""

    def __init__(self):
        self.records = []

    def around(self, event_ids, keys, position, since_us):
        with duckdb.connect(config={"threads": 1}) as connection:
            connection.execute("set TimeZone = 'UTC'")
            connection.register("records", as_table(alive(self.records)))
            connection.register("ids", asked(event_ids))
            connection.execute("create temp table asked as select * from ids")
            oldest = oldest_landing_us(since_us)
            connection.execute(
                f"create temp table history as select * from records "
                f"where landed_at >= make_timestamptz({oldest}) and ({below_sql(position)})"
            )
            return around(connection, keys)


def as_table(records: list[dict]) -> pa.Table:
    return to_table([tuple(record.get(name) for name in EVENTS_SCHEMA.names) for record in records])


def alive(records: list[dict]) -> list[dict]:
    """Less dead letters."""
    return [r for r in records if -FURTHEST_AHEAD_US <= r["landed_at"] - r["event_ts"] <= DUPLICATE_MEMORY_US]


def typed(record: dict) -> dict:
    """With the staging model's typed column: integers and texts of integers count, the rest is NULL."""
    watch = orjson.loads(record["properties"] or "{}").get("watch_ms")
    text = str(watch) if isinstance(watch, int | str) and not isinstance(watch, bool) else ""
    return {**record, "watch_ms": int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None}
