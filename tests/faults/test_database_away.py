"""PostgreSQL goes away while it is read: reads are repeated, waits end, and the store stays whole at its tick."""

import contextlib
import threading
import time

import pytest

from streaming_sql.postgres_reader import PostgresReader, ReaderSettings
from streaming_sql.replica import Replica
from tests.streaming_sql.generated import as_table
from tests.streaming_sql.postgres import Server
from tests.streaming_sql.test_risingwave_models import GROUPS, a_log, compiled, create_views, load_into_postgres, manifest
from warehouse.errors import HeadraceError

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


def test_a_database_that_stays_away_is_said_within_bounds_and_the_store_keeps_its_tick(server, opened, compiled):
    with server.connected() as connection:
        load_into_postgres(connection, as_table(a_log(5, 400)))
        create_views(connection, compiled)
    replica = Replica(opened(QUICK), GROUPS)
    assert replica.refresh()
    view = replica.store.view()
    server.kill()
    began = time.monotonic()
    with pytest.raises(HeadraceError, match=r"the database at .*/dev did not answer in 4 attempts"):
        replica.refresh()
    assert time.monotonic() - began < 15
    assert replica.store.view() is view
    server.start()
    assert not replica.refresh()


def test_a_cluster_that_dies_between_two_groups_moves_nothing(server, opened, compiled, monkeypatch):
    with server.connected() as connection:
        load_into_postgres(connection, as_table(a_log(5, 400)))
        create_views(connection, compiled)
    replica = Replica(opened(QUICK), GROUPS)
    read, names = replica.views.rows, []

    def read_and_kill(reader, name, *given):
        names.append(name)
        if len(names) == 2:
            server.kill()
        return read(reader, name, *given)

    monkeypatch.setattr(replica.views, "rows", read_and_kill)
    with pytest.raises(HeadraceError, match="did not answer"):
        replica.refresh()
    assert (replica.store.tick_us, len(names)) == (0, 2)
    server.start()
    assert replica.refresh()
    assert replica.store.view().groups["note_engagement"].layers


def test_a_statement_that_takes_too_long_ends_and_a_wrong_one_is_not_repeated(opened):
    reader = opened(ReaderSettings(statement_timeout_s=0.3, attempts=1))
    began = time.monotonic()
    with pytest.raises(HeadraceError, match="statement timeout"):
        reader.rows("select pg_sleep(5)")
    assert time.monotonic() - began < 3
    with pytest.raises(HeadraceError, match=r"refuses the statement: .*no_such_view"):
        opened(QUICK).rows("select * from no_such_view")
    assert reader.num_repeated == 0


def test_a_database_that_hangs_is_given_up_in_time_and_read_again_when_it_wakes(server, opened):
    reader = opened(ReaderSettings(statement_timeout_s=0.3, attempts=2, no_attempt_after_s=0.15))
    assert reader.rows("select 1 as one") == [{"one": 1}]
    with server.hanging():
        began = time.monotonic()
        with pytest.raises(HeadraceError, match="did not answer in 1 attempts"):
            reader.rows("select 2 as two")
        assert time.monotonic() - began < 3
    assert reader.rows("select 3 as three") == [{"three": 3}]


def test_the_pool_has_a_bound(opened):
    reader = opened(ReaderSettings(connections=1, statement_timeout_s=0.5, attempts=1))
    held = threading.Thread(target=lambda: reader.rows("select pg_sleep(0.4)"))
    held.start()
    time.sleep(0.1)
    assert reader.rows("select 1 as one") == [{"one": 1}]
    held.join()
