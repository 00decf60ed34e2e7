"""What a server beside RisingWave keeps in memory, and how it hears of ticks: one group, its block SQL on PostgreSQL."""

import contextlib
import time

import duckdb
import psycopg
import pytest

from streaming_sql import group_state
from streaming_sql.cluster import AWAY, STALE, Cluster
from streaming_sql.feed import Feed
from streaming_sql.short_head import SHORT
from tests.parity.test_postgres_equals_duckdb import stage_on_both
from tests.streaming_sql.generated import START_US, ListHistory, as_table, typed
from tests.streaming_sql.postgres import Server
from tests.streaming_sql.subscriptions import CURSORS, WATCHED, Proxy
from tests.streaming_sql.test_live_store import assert_equals_oracle
from tests.streaming_sql.test_memory import groups, visits
from warehouse.features.render import block_sql
from warehouse.time_algebra import FIVE_MINUTES_US

__all__ = ["groups"]  # the fixture

NUM_TICKS, PER_TICK = 6, 20
RECORDS = [
    {"properties": None, **record} for tick in range(NUM_TICKS) for record in visits(tick, tick * (PER_TICK + 1), PER_TICK)
]
EVENTS = [typed(record) for record in RECORDS]
EVERYBODY = sorted({record["user_id"] for record in RECORDS})


def tick_at(number):
    return START_US + number * FIVE_MINUTES_US


class Beside:
    """A cluster whose views know all of RECORDS and whose tick is moved, and a feed that takes them tick by tick."""

    def __init__(self, dsn, groups, max_head_events=None):
        self._dsn, self._groups = dsn, groups
        with duckdb.connect() as batch, psycopg.connect(dsn, autocommit=True) as stream:
            stage_on_both(batch, stream, as_table(RECORDS))
            for name, group in groups.items():
                stream.execute(f"create view {name} as {block_sql(group, 'staged', 'retracted', dialect='risingwave')}")
            stream.execute("create table closed_tick (closed_tick timestamptz)")
            stream.execute(CURSORS)
            stream.execute(WATCHED)
            stream.execute("insert into closed_tick values (to_timestamp(%s))", [tick_at(0) / 1e6])
        self.proxy = Proxy(dsn)
        self.cluster = Cluster(self.proxy.dsn, groups, timeout_s=5.0, connections=1, num_readers=1000)
        self.store, history = self.cluster.open_store(lambda: (0, 0)), ListHistory()
        history.records += RECORDS
        self._feed, self.now_us = Feed(self.store, groups, (0, 0), history, None, self.cluster, max_head_events), 0

    def close(self):
        self.cluster.stop()
        self.proxy.close()

    def close_tick(self, number):
        with psycopg.connect(self._dsn) as connection:
            connection.execute("update closed_tick set closed_tick = to_timestamp(%s)", [tick_at(number) / 1e6])

    def take(self, number):
        """The records of one tick."""
        records = visits(number, number * (PER_TICK + 1), PER_TICK)
        self._feed.take(as_table(records), is_history=number == 0)
        self.now_us = records[-1]["landed_at"] + 1

    def move(self):
        return self._feed.move().closed_tick_us

    def assert_equals_oracle(self, user_ids=EVERYBODY):
        for user_id in user_ids:
            view, said = self.cluster.view_of(user_id)
            assert said == []
            assert_equals_oracle(view, EVENTS, self.now_us, self._groups, lambda group: [(user_id,)])  # noqa: B023


@pytest.fixture(scope="module")
def server():
    with Server.started("dev") as server:
        yield server


@pytest.fixture
def beside(server, groups, request):
    """Makes one, in a database of its own."""
    with contextlib.ExitStack() as stack:

        def make(**settings):
            name = f"beside_{abs(hash(request.node.name))}"
            with server.connected() as connection:
                connection.execute(f"create database {name}")
            dsn = psycopg.conninfo.make_conninfo(server.dsn, dbname=name)
            return stack.enter_context(contextlib.closing(Beside(dsn, groups, **settings)))

        yield make


def test_texts_of_readers_are_in_no_table_that_grows_with_readers(beside, monkeypatch):
    monkeypatch.setattr(group_state, "_FEW", 8)
    one = beside()
    most = 0
    for number in range(NUM_TICKS):
        one.take(number)
        if number:
            one.close_tick(number)
            one.cluster.look()
            assert one.move() == tick_at(number)
        one.assert_equals_oracle(EVERYBODY[::7] if number < NUM_TICKS - 1 else EVERYBODY)
        most = max(most, len(one.store.view().groups["visitors"].codes))
    assert most < 3 * PER_TICK
    own = [one.cluster.view_of(user_id)[0].groups["visitors"] for user_id in EVERYBODY]
    assert max(len(state.codes) for state in own) <= 2 * NUM_TICKS
    assert len(EVERYBODY) > 100


def test_while_no_tick_comes_the_head_keeps_the_newest_events_it_has_room_for(beside):
    one = beside(max_head_events=60)
    for number in range(NUM_TICKS):
        one.take(number)
        assert one.store.num_head_events() <= 60 + PER_TICK + 2
    view, said = one.cluster.view_of("regular")
    assert (said, view.lacks_events) == ([SHORT], True)
    assert "the oldest events since were dropped (features_head_events)" in one.cluster.troubles()[0]
    newest = f"u{NUM_TICKS - 1}-3"
    found = one.cluster.view_of(newest)[0].assemble("visitors", [(newest,)], one.now_us)
    assert found.sequences["user_fresh_notes_30m"] == [[f"n{NUM_TICKS - 1}-3"]]
    one.close_tick(NUM_TICKS - 1)
    one.cluster.look()
    assert one.move() == tick_at(NUM_TICKS - 1)
    assert one.cluster.troubles() == []
    one.assert_equals_oracle(EVERYBODY[::5])


def test_a_tick_is_read_as_soon_as_it_is_told_and_a_cluster_that_left_is_found_again(beside):
    one = beside()

    def until(said):
        deadline = time.monotonic() + 20
        while not said():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    one.take(0)
    one.cluster.start(every_s=0.1)
    until(lambda: one.proxy.declared)
    one.take(1)
    one.close_tick(1)
    until(lambda: one.move() == tick_at(1))
    one.assert_equals_oracle(["regular"])
    one.proxy.is_away = True
    one.proxy.cut()
    until(lambda: one.cluster.is_away)
    assert one.cluster.view_of("u1-3")[1] == [AWAY, STALE]
    assert "RisingWave has not answered for" in one.cluster.troubles()[0]
    one.proxy.is_away = False
    one.take(2)
    one.close_tick(2)
    until(lambda: one.move() == tick_at(2))
    until(lambda: not one.cluster.is_away)
    one.assert_equals_oracle(["regular", "u1-3"])
    until(lambda: len(one.proxy.declared) > 1)
