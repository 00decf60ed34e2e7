"""What a person would write instead: a NumPy program of prefix sums, and one SQL range join. Both know the one group."""

import threading
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bench.features.declared import COUNTED, GROUP, START_US, WINDOWS
from warehouse.time_algebra import FIVE_MINUTES_US, GRACE_US, MINUTE_US, parse_window


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


def by_range_join(events: pa.Table, spine: pa.Table, limit_s: float) -> pa.Table | None:
    """One join on key and time, one filtered aggregate per feature: exact, and the plain way to say it in SQL. None if that is
    not done within the limit."""
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
        alarm = threading.Timer(limit_s, connection.interrupt)
        alarm.start()
        try:
            return connection.execute(
                f"select impression_id, {', '.join(items)} from spine left join events on spine.note_id = events.note_id "
                "and event_ts >= tick - interval 30 day and event_ts < tick and known_at <= tick "
                "group by impression_id order by impression_id"
            ).to_arrow_table()
        except duckdb.InterruptException:
            return None
        finally:
            alarm.cancel()
