"""The streaming models on the cluster that RISINGWAVE_DSN names: every view beside DuckDB, and a replica fed from them.

Everything is made in a schema of its own, which is dropped at the end. A PostgreSQL may stand in (it then says nothing of
RisingWave). Kafka is not needed: the events table is made without its connector.
"""

import contextlib
import os

import duckdb
import numpy as np
import psycopg
import pytest

from streaming_sql.postgres_reader import PostgresReader
from streaming_sql.replica import Replica
from tests.streaming_sql.generated import as_table
from tests.streaming_sql.test_replica import KEYS, fed
from tests.streaming_sql.test_risingwave_models import (
    GROUPS,
    STAGING,
    a_log,
    comparable,
    compiled,
    create_log_events,
    create_views,
    manifest,
    rows_of,
)
from warehouse.features.render import block_sql, retracted_sql, retractions_sql, staging_sql
from warehouse.time_algebra import DUPLICATE_MEMORY_US, FURTHEST_AHEAD_US

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
            settle(connection)
            yield connection, records
        finally:
            connection.execute(f"drop schema {SCHEMA} cascade")


def fill(connection, events):
    given = create_log_events(connection)
    marks = ", ".join("%s::jsonb" if name == "properties" else "%s" for name in given)
    with connection.cursor() as cursor:
        rows = events.select(given).to_pylist()
        cursor.executemany(
            f"insert into log_events values ({marks})",
            [[str(row[name]) if name.startswith("log_") else row[name] for name in given] for row in rows],
        )


def settle(connection):
    """Waits until the views hold what was inserted (RisingWave; elsewhere they are made full)."""
    (version,) = connection.execute("select version()").fetchone()
    if "risingwave" in version.lower():
        connection.execute("flush")


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


def test_a_replica_answers_as_the_embedded_store(cluster):
    _, records = cluster
    store = fed(records)
    found = psycopg.conninfo.make_conninfo(DSN, options=f"-c search_path={SCHEMA}")
    with contextlib.closing(PostgresReader(found)) as reader:
        replica = Replica(reader, GROUPS)
        assert replica.refresh()
        assert replica.store.tick_us == store.tick_us
        for name in ("note_engagement", "author_engagement", "user_author_affinity"):
            mine, theirs = (one.view().assemble(name, KEYS[name], store.tick_us) for one in (replica.store, store))
            assert np.array_equal(mine.values, theirs.values, equal_nan=True), name
