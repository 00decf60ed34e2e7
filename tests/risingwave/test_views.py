"""The streaming models on the cluster that RISINGWAVE_DSN names: every view beside DuckDB, and features read from them.

Everything is made in a schema of its own, which is dropped at the end. A PostgreSQL may stand in (it then says nothing of
RisingWave). Kafka is not needed: the events table is made without its connector.
"""

import contextlib
import os
import threading
import time

import duckdb
import psycopg
import pytest

from streaming_sql.changes import Changes
from streaming_sql.cluster import Cluster
from streaming_sql.feed import Feed
from streaming_sql.tick_news import TickNews
from tests.parity.test_cluster_equals_oracle import assert_each_reader_equals_oracle, end_of
from tests.streaming_sql.generated import ListHistory, as_table, typed
from tests.streaming_sql.generated import alive as living
from tests.streaming_sql.test_risingwave_models import (
    FIELDS_OF_LOG,
    GROUPS,
    PLACE_IN_LOG,
    SINKS,
    SLIDING,
    STAGING,
    SUBSCRIPTIONS,
    a_log,
    assert_newest,
    comparable,
    compiled,
    create_log_events,
    create_views,
    instant_us,
    manifest,
    rows_for_log,
    rows_of,
)
from warehouse.features.oracle import Read, values
from warehouse.features.render import block_sql, retracted_sql, retractions_sql, staging_sql
from warehouse.time_algebra import DAY_US, DUPLICATE_MEMORY_US, FIVE_MINUTES_US, FURTHEST_AHEAD_US, MINUTE_US, closed_tick

__all__ = ["compiled", "manifest"]  # the fixtures

DSN = os.environ.get("RISINGWAVE_DSN", "")
SCHEMA = "headrace_test"
pytestmark = pytest.mark.skipif(not DSN, reason="RISINGWAVE_DSN names no cluster")


@pytest.fixture(scope="module")
def cluster(compiled):
    """(connection, the log's records): the views over a log of generated events."""
    records = a_log(11, 1200)
    with psycopg.connect(DSN, autocommit=True) as connection:
        connection.execute(f"drop schema if exists {SCHEMA} cascade")
        connection.execute(f"create schema {SCHEMA}")
        connection.execute(f"set search_path = {SCHEMA}")
        try:
            fill(connection, as_table(records))
            here = {name: sql.replace('"dev"."public".', f'"{SCHEMA}".') for name, sql in compiled.items()}
            create_views(connection, here, "materialized view")
            if is_risingwave(connection):
                connection.execute(f"create materialized view {SLIDING} as {here[SLIDING]}")
                for name in SUBSCRIPTIONS:
                    viewed = name.removesuffix("_changes")
                    connection.execute(f"create subscription {name} from {viewed} with (retention = '1 day')")
            settle(connection)
            yield connection, records
        finally:
            connection.execute(f"drop schema {SCHEMA} cascade")


def fill(connection, events):
    create_log_events(connection)
    insert(connection, events)


def insert(connection, events):
    marks = ", ".join("%s::jsonb" if name == "properties" else "%s" for name in (*FIELDS_OF_LOG, *PLACE_IN_LOG))
    with connection.cursor() as cursor:
        cursor.executemany(f"insert into log_events values ({marks})", list(rows_for_log(events)))


def settle(connection):
    """Waits until the views hold what was inserted (RisingWave; elsewhere they are made full)."""
    if is_risingwave(connection):
        connection.execute("flush")


def is_risingwave(connection):
    (version,) = connection.execute("select version()").fetchone()
    return "risingwave" in version.lower()


@pytest.fixture
def risingwave(cluster):
    """The cluster, where it is RisingWave and no stand-in."""
    if not is_risingwave(cluster[0]):
        pytest.skip("the database that RISINGWAVE_DSN names is no RisingWave")
    return cluster


def test_a_sliding_hour_holds_the_events_of_its_hour(risingwave):
    connection, records = risingwave
    counted = {
        (row["note_id"], instant_us(row["window_end"])): row for row in rows_of(connection.execute(f"select * from {SLIDING}"))
    }
    group, later_us = GROUPS["note_engagement"], records[-1]["landed_at"] + 10 * DAY_US
    events = [typed(record) for record in living(records)]
    assert len(counted) > 200
    for note_id, end_us in list(counted)[::20]:
        expected = values(group, events, Read((note_id,), end_us, end_us, later_us))
        assert counted[note_id, end_us]["num_clicks"] == expected["note_num_clicks_1h"]


def test_what_a_sink_writes_is_each_block_row_of_closed_ticks(cluster, compiled):
    connection, _ = cluster
    for name in SINKS:
        body = compiled[name].replace('"dev"."public".', f'"{SCHEMA}".')
        group = name.removesuffix("_to_lake")
        there = f"select count(*) from {group} where known_at <= (select max(closed_tick) from closed_tick)"
        assert [len(connection.execute(body).fetchall())] == list(connection.execute(there).fetchone())


def test_a_subscription_gives_every_row_and_then_what_changes(risingwave):
    connection, _ = risingwave
    rows = rows_of(connection.execute("select * from note_engagement"))
    found = psycopg.conninfo.make_conninfo(DSN, options=f"-c search_path={SCHEMA}")
    with contextlib.closing(Changes.open(found, f"{SCHEMA}.note_engagement_changes", wait_s=10)) as changes:
        first = changes.next(at_most=100_000)
        assert all(change.is_added and change.changed_ms is None for change in first)
        assert comparable([dict(change.row) for change in first]) == comparable(rows)
    with contextlib.closing(
        Changes.open(found, f"{SCHEMA}.note_engagement_changes", since_ms=round(time.time() * 1000))
    ) as changes:
        assert changes.next() == []


def test_a_changed_view_is_swapped_in_under_the_name_that_is_read(risingwave):
    connection, _ = risingwave
    for name, value in (("swapped", 1), ("swapped_next", 2)):
        connection.execute(f"create materialized view {name} as select {value} as version, count(*) as num from arrivals")
    connection.execute("alter materialized view swapped swap with swapped_next")
    assert connection.execute("select version from swapped").fetchone() == (2,)


def test_arrivals_leave_every_view_once_the_temporal_filter_lets_them_go(risingwave):
    connection, _ = risingwave
    connection.execute("create table clock_of_arrivals (event_id varchar, landed_at timestamptz)")
    connection.execute(
        "create materialized view kept as "
        "select count(*) as num from clock_of_arrivals where landed_at > now() - interval '5 seconds'"
    )
    connection.execute("insert into clock_of_arrivals values ('e', now())")
    connection.execute("flush")
    assert connection.execute("select num from kept").fetchone() == (1,)
    time.sleep(10)
    connection.execute("flush")
    assert connection.execute("select num from kept").fetchone() == (0,)


def test_every_view_agrees_with_the_batch_side_to_the_bit(cluster):
    connection, records = cluster
    alive = f"landed_at - event_ts between to_microseconds({-FURTHEST_AHEAD_US}) and to_microseconds({DUPLICATE_MEMORY_US})"
    batch = duckdb.connect()
    batch.execute("set TimeZone = 'UTC'")
    batch.register("events", as_table(records))
    batch.execute(f"create table landed as select * from events where {alive}")
    batch.execute(f"create table staged as {staging_sql('landed')}")
    batch.execute(f"create table retractions as {retractions_sql('landed')}")
    batch.execute(f"create table retracted as {retracted_sql('staged', 'retractions')}")
    for mine, name in zip(STAGING, ("staged", "retractions", "retracted"), strict=True):
        assert comparable(rows_of(connection.execute(f"select * from {mine}"))) == comparable(
            rows_of(batch.execute(f"from {name}"))
        )
    for name, group in GROUPS.items():
        expected = comparable(rows_of(batch.execute(block_sql(group, "staged", "retracted"))))
        assert comparable(rows_of(connection.execute(f"select * from {name}"))) == expected, name
    assert_newest(connection, records)


def test_a_server_beside_the_cluster_reads_what_the_oracle_says(cluster):
    _, records = cluster
    found = psycopg.conninfo.make_conninfo(DSN, options=f"-c search_path={SCHEMA}")
    here = Cluster(found, GROUPS, timeout_s=20.0, connections=1, num_readers=10)
    try:
        store, history = here.open_store(lambda: end_of(records)), ListHistory()
        history.records += records
        Feed(store, GROUPS, (0, 0), history, elsewhere=here).take(as_table(records), is_history=True)
        here.look()
        assert here.take(store.tick_us + DAY_US) is None
        events = [typed(record) for record in living(records)]
        assert_each_reader_equals_oracle(here, events, records[-1]["landed_at"] + MINUTE_US)
    finally:
        here.stop()


def test_a_new_tick_is_told_by_the_subscription_on_the_tick_view(risingwave):
    connection, records = risingwave
    found, stopping = psycopg.conninfo.make_conninfo(DSN, options=f"-c search_path={SCHEMA}"), threading.Event()
    newest = {record["log_partition"]: record for record in records}
    with contextlib.closing(TickNews(found, look_s=30.0)) as news:
        assert news.wait(stopping) == closed_tick([record["landed_at"] for record in newest.values()])
        later_us = max(record["landed_at"] for record in newest.values()) + 2 * FIVE_MINUTES_US
        idle = [
            {
                **record,
                "event_id": f"idle{partition}",
                "event_type": "heartbeat",
                "retracts": None,
                "log_offset": record["log_offset"] + 1,
            }
            | {"landed_at": later_us, "event_ts": later_us}
            for partition, record in newest.items()
        ]
        insert(connection, as_table(idle))
        settle(connection)
        told, deadline = 0, time.monotonic() + 60
        while told != closed_tick([later_us]):
            assert time.monotonic() < deadline
            told = news.wait(stopping)
            assert told is not None
