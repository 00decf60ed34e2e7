"""Generated logs and spines, and lakes built from them by the macros that dbt runs, slice by slice so that any size fits."""

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bench.features.declared import DAYS, START_US, TYPES
from bench.features.timing import Spent, timed
from warehouse.events import TIMESTAMP
from warehouse.features.compute_source import RETRACTIONS, SHADOWED, Relations
from warehouse.features.declarations import FeatureGroup
from warehouse.features.render import render_macro, retractions_sql, roll_up_sql, staging_sql
from warehouse.home import Home
from warehouse.lake import BUILT_UNTIL, Lake
from warehouse.time_algebra import DAY_US, FIVE_MINUTES_US, GRACE_US, HOUR_US

SHARE_LATE = 0.01
TYPE_SHARES = (0.55, 0.2, 0.08, 0.04, 0.03, 0.1)
EVENTS_AT_ONCE = 5_000_000
STAGED, RETRACTED = "staging.stg_engagements", "staging.stg_retracted_events"
UNTIL = datetime.fromtimestamp((START_US + (DAYS + 2) * DAY_US) / 1_000_000, UTC).isoformat()


def logs(num_events: int, num_keys: int, seed: int = 7) -> Iterator[pa.Table]:
    """Rows of `lake.events`, in order of event time from slice to slice: keys skewed (a few notes draw most events), one event
    in a hundred minutes to hours late."""
    rng = np.random.default_rng(seed)
    num_slices = -(-num_events // EVENTS_AT_ONCE)
    edges = np.linspace(0, num_events, num_slices + 1).astype(int)
    length_us = DAYS * DAY_US // num_slices
    for number, (first, end) in enumerate(pairwise(edges)):
        yield _log(rng, int(end - first), num_keys, START_US + number * length_us, length_us, int(first))


def _log(rng: np.random.Generator, num_events: int, num_keys: int, from_us: int, length_us: int, first_offset: int) -> pa.Table:
    key = _skewed(rng, num_events, num_keys)
    event_us = np.sort(from_us + rng.integers(0, length_us, num_events))
    late = rng.random(num_events) < SHARE_LATE
    delay_us = np.where(late, rng.exponential(2 * HOUR_US, num_events), rng.integers(0, 5_000_000, num_events)).astype(np.int64)
    landed_us = event_us + delay_us
    order = np.argsort(landed_us, kind="stable")
    drawn = pa.table(
        {
            "key": key[order],
            "kind": rng.choice(len(TYPES), num_events, p=TYPE_SHARES),
            "event_us": event_us[order],
            "landed_us": landed_us[order],
            "watch": rng.integers(0, 60_000, num_events),
        }
    )
    with duckdb.connect() as connection:
        connection.execute("set TimeZone = 'UTC'")
        connection.register("drawn", drawn)
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
            from (select *, row_number() over () - 1 + {first_offset} as log_offset from drawn)
            """
        ).to_arrow_table()


def _skewed(rng: np.random.Generator, number: int, num_keys: int) -> np.ndarray:
    chance = 1 / (np.arange(num_keys) + 20.0)
    return np.searchsorted(np.cumsum(chance) / chance.sum(), rng.random(number))


def generated_spine(num_rows: int, num_keys: int, seed: int = 8) -> pa.Table:
    """Impressions of the same skewed notes, at any time of the 30 days."""
    rng = np.random.default_rng(seed)
    key = _skewed(rng, num_rows, num_keys)
    request_us = np.sort(START_US + HOUR_US + rng.integers(0, DAYS * DAY_US - 2 * HOUR_US, num_rows))
    return pa.table(
        {
            "impression_id": pa.array(np.arange(num_rows)),
            "note_id": pc.binary_join_element_wise("n", pa.array(key).cast(pa.string()), ""),
            "request_ts": pa.array(request_us).cast(TIMESTAMP),
        }
    )


def ticks_sql(request_ts: str) -> str:
    """T of a request, in SQL."""
    return f"make_timestamptz((epoch_us({request_ts}) - {GRACE_US}) // {FIVE_MINUTES_US} * {FIVE_MINUTES_US})"


def add(lake: Lake, name: str, rows: pa.Table) -> None:
    """Adds rows to a table, which is then built until after the last event."""
    with lake.create(name, rows.schema, {"known_at": "day"}).transaction() as transaction:
        transaction.append(rows)
        transaction.set_properties({BUILT_UNTIL: UNTIL})


def replace(lake: Lake, name: str, rows: pa.Table) -> None:
    if lake.exists(name):
        lake.catalogue.drop_table(name)
    add(lake, name, rows)


def staged(home: Home, num_events: int, num_keys: int) -> tuple[Lake, Spent]:
    """A lake with staged events, and what removing duplicates took. There are no retractions and no duplicates in it."""
    lake = Lake.open(home)
    dedup = None
    for log in logs(num_events, num_keys):
        with duckdb.connect() as connection:
            connection.execute("set TimeZone = 'UTC'")
            connection.register("log", log)
            spent, rows = timed(lambda connection=connection: connection.execute(staging_sql("log")).to_arrow_table())
            retractions = connection.execute(retractions_sql("log")).to_arrow_table()
        dedup = spent if dedup is None else dedup + spent
        add(lake, STAGED, rows)
    assert dedup is not None
    none = rows.slice(0, 0)
    replace(lake, SHADOWED, none.append_column("retracts", pa.array([], pa.string())).append_column(
        "shadowed_by", pa.array([], pa.list_(pa.int64()))
    ))  # fmt: skip
    replace(lake, RETRACTIONS, retractions)
    replace(lake, RETRACTED, none.append_column("retracted_at", pa.array([], TIMESTAMP)))
    return lake, dedup


def select(lake: Lake, sql: str) -> pa.Table:
    with lake.duckdb() as connection:
        return connection.execute(sql).to_arrow_table()


def build_blocks(lake: Lake, group: FeatureGroup, days_at_once: int = DAYS + 2) -> None:
    """The group's 5-minute blocks, read from and written to Iceberg, some days of arrival at a time."""
    names = Relations.of(group)
    if lake.exists(names.blocks):
        lake.catalogue.drop_table(names.blocks)
    for first in range(0, DAYS + 2, days_at_once):
        edges = [f"make_timestamptz({START_US + day * DAY_US})" for day in (first, first + days_at_once)]
        in_range = f"known_at >= {edges[0]} and known_at < {edges[1]}"
        add(lake, names.blocks, select(lake, render_macro("block_rows", group.as_meta(), STAGED, RETRACTED, in_range)))


def build_roll_ups(lake: Lake, group: FeatureGroup) -> None:
    names = Relations.of(group)
    replace(lake, names.hours, select(lake, roll_up_sql(group, names.blocks, 60)))
    replace(lake, names.days, select(lake, roll_up_sql(group, names.hours, 1440)))


def no_roll_ups(lake: Lake, group: FeatureGroup) -> None:
    """Empty hours and days: sums of integers never read them."""
    names = Relations.of(group)
    with lake.duckdb() as connection:
        rows = connection.execute(f"from {names.blocks} limit 0").to_arrow_table()
    for name in (names.hours, names.days):
        replace(lake, name, rows)


def num_rows(lake: Lake, name: str) -> int:
    return int(lake.properties(name).get("total-records", 0))
