"""PostgreSQL goes away while it is read: reads are repeated, waits end, and the store stays whole at its tick."""

import contextlib
import threading
import time

import pytest

from streaming_sql.cluster import Cluster
from streaming_sql.postgres_reader import PostgresReader, ReaderSettings
from tests.streaming_sql.generated import as_table
from tests.streaming_sql.postgres import Server
from tests.streaming_sql.test_risingwave_models import (
    GROUPS,
    a_log,
    compiled,
    copy_into_log,
    create_views,
    load_into_postgres,
    manifest,
)
from warehouse.errors import HeadraceError
from warehouse.time_algebra import DAY_US

__all__ = ["compiled", "manifest"]  # the fixtures

QUICK = ReaderSettings(connect_timeout_s=2, statement_timeout_s=2.0, attempts=4, first_pause_s=0.2)


@pytest.fixture
def server():
    with Server.started("dev") as server:
        yield server


@pytest.fixture
def opened(server):
    """Makes readers that are closed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda settings: stack.enter_context(contextlib.closing(PostgresReader(server.dsn, settings)))


@pytest.fixture
def beside(server):
    """Makes a cluster of it that is stopped at the end."""
    with contextlib.ExitStack() as stack:

        def make():
            cluster = Cluster(server.dsn, GROUPS, timeout_s=2.0, connections=1, num_readers=10)
            stack.callback(cluster.stop)
            return cluster

        yield make


@contextlib.contextmanager
def after(seconds, *steps):
    thread = threading.Thread(target=lambda: (time.sleep(seconds), *(step() for step in steps)))
    thread.start()
    yield
    thread.join()


def test_a_read_that_is_cut_in_the_middle_is_made_again(server, opened):
    reader = opened(QUICK)
    with after(0.3, server.kill, server.start):
        assert reader.rows("select 7 as seven, pg_sleep(1)")[0]["seven"] == 7
    assert reader.num_repeated >= 1


def test_each_connection_that_was_cut_is_replaced(server, opened):
    reader = opened(QUICK)
    for _ in range(3):
        assert reader.rows("select 1 as one") == [{"one": 1}]
        server.kill()
        server.start()
    assert reader.rows("select 1 as one") == [{"one": 1}]


def test_a_database_that_stays_away_is_said_within_bounds_and_the_store_keeps_its_tick(server, beside, compiled):
    with server.connected() as connection:
        load_into_postgres(connection, as_table(a_log(5, 400)))
        create_views(connection, compiled)
    cluster = beside()
    store = cluster.open_store(lambda: (0, 0))
    view = store.view()
    server.kill()
    began = time.monotonic()
    with pytest.raises(HeadraceError, match=r"the database at .*/dev did not answer in 2 attempts"):
        cluster.look()
    assert time.monotonic() - began < 15
    assert cluster.take(store.tick_us + DAY_US) is None
    assert store.view() is view
    server.start()
    cluster.look()
    assert cluster.take(store.tick_us + DAY_US) is None  # it is the tick that the store holds


def test_a_cluster_that_dies_between_two_groups_moves_nothing(server, beside, compiled, monkeypatch):
    records = a_log(5, 400)
    with server.connected() as connection:
        load_into_postgres(connection, as_table(records[:300]))
        create_views(connection, compiled)
    cluster = beside()
    store = cluster.open_store(lambda: (0, 0))
    with server.connected() as connection:
        copy_into_log(connection, as_table(records[300:]))
    read, names = cluster._views.rows, []

    def read_and_kill(reader, name, *given):
        names.append(name)
        if len(names) == 2:
            server.kill()
        return read(reader, name, *given)

    monkeypatch.setattr(cluster._views, "rows", read_and_kill)
    with pytest.raises(HeadraceError, match="did not answer"):
        cluster.look()
    assert len(names) == 2
    assert cluster.take(store.tick_us + DAY_US) is None
    server.start()
    cluster.look()
    taken = cluster.take(store.tick_us + DAY_US)
    assert taken.tick_us > store.tick_us
    assert min(taken.rows[name].num_rows for name in names) > 0


def test_a_statement_that_takes_too_long_ends_and_a_wrong_one_is_not_repeated(opened):
    reader = opened(ReaderSettings(statement_timeout_s=0.3, attempts=1))
    began = time.monotonic()
    with pytest.raises(HeadraceError, match="statement timeout"):
        reader.rows("select pg_sleep(5)")
    assert time.monotonic() - began < 3
    with pytest.raises(HeadraceError, match=r"refuses the statement: .*no_such_view"):
        (wrong := opened(QUICK)).rows("select * from no_such_view")
    assert (reader.num_repeated, wrong.num_repeated) == (0, 0)


def test_a_database_that_hangs_is_given_up_in_time_and_read_again_when_it_wakes(server, opened):
    reader = opened(ReaderSettings(statement_timeout_s=1.0, attempts=2, no_attempt_after_s=0.5))
    assert reader.rows("select 1 as one") == [{"one": 1}]
    with server.hanging():
        began = time.monotonic()
        with pytest.raises(HeadraceError, match="did not answer in 1 attempts"):
            reader.rows("select 2 as two")
        assert time.monotonic() - began < 3
    assert reader.rows("select 3 as three") == [{"three": 3}]


def test_the_pool_has_a_bound(opened):
    reader = opened(ReaderSettings(connections=1, statement_timeout_s=5.0, attempts=1))
    held = threading.Thread(target=lambda: reader.rows("select pg_sleep(0.4)"))
    held.start()
    time.sleep(0.1)
    assert reader.rows("select 1 as one") == [{"one": 1}]
    held.join()
