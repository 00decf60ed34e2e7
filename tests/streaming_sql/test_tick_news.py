"""New ticks as a subscription tells of them. RisingWave's statements are rewritten on their way to PostgreSQL, whose
functions do as they say; the dialect itself is run by tests/risingwave."""

import datetime
import logging
import threading
import time
from contextlib import closing

import psycopg
import pytest

from streaming_sql import tick_news
from streaming_sql.changes import Changes
from streaming_sql.records import to_us
from streaming_sql.tick_news import SUBSCRIPTION, TickNews
from tests.streaming_sql.postgres import Server
from tests.streaming_sql.subscriptions import CURSORS, WATCHED, Proxy
from warehouse.errors import HeadraceError

NOON = datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC)


@pytest.fixture(scope="module")
def server():
    with Server.started("dev") as server, server.connected() as connection:
        connection.execute("create table closed_tick (closed_tick timestamptz)")
        connection.execute(CURSORS)
        connection.execute(WATCHED)
        yield server


@pytest.fixture
def ticks(server):
    """Moves the tick view, which begins at noon and remembers no change."""
    with server.connected() as connection:
        connection.execute("truncate closed_tick")
        connection.execute("insert into closed_tick values (%s)", [NOON])
        connection.execute("truncate changes_of_tick")

        def move(minutes):
            connection.execute("update closed_tick set closed_tick = %s", [NOON + datetime.timedelta(minutes=minutes)])
            return to_us(NOON) + minutes * 60_000_000

        move.connection = connection
        yield move


@pytest.fixture
def proxy(server):
    with closing(Proxy(server.dsn)) as proxy:
        yield proxy


@pytest.fixture
def stopping():
    return threading.Event()


def waited(news, stopping, until=None):
    """The first answer, or the first that is `until`, and how long it took."""
    began = time.monotonic()
    while (told := news.wait(stopping)) != until and until is not None:
        assert time.monotonic() - began < 10
    return told, time.monotonic() - began


def test_the_tick_that_is_there_is_told_and_then_each_as_it_closes(proxy, ticks, stopping):
    with closing(TickNews(proxy.dsn, look_s=1.0)) as news:
        assert waited(news, stopping)[0] == to_us(NOON)
        assert waited(news, stopping)[0] == to_us(NOON)  # a second without news
    with closing(TickNews(proxy.dsn, look_s=30.0)) as news:
        waited(news, stopping)
        for minutes in (5, 10):
            closes = threading.Timer(0.2, ticks, [minutes])
            closes.start()
            _, took_s = waited(news, stopping, to_us(NOON) + minutes * 60_000_000)
            closes.join()
            assert took_s < 5


def test_a_change_says_which_row_came_and_which_went(proxy, ticks):
    with closing(Changes.open(proxy.dsn, SUBSCRIPTION)) as changes:
        ((first,), empty) = changes.next(), changes.next()
        ticks(5)
        told = changes.next()
    assert (first.row, first.is_added, first.changed_ms, empty) == ({"closed_tick": NOON}, True, None, [])
    later = NOON + datetime.timedelta(minutes=5)
    assert [(change.row["closed_tick"], change.is_added) for change in told] == [(NOON, False), (later, True)]
    assert abs(told[0].changed_ms / 1000 - time.time()) < 60


def test_after_a_broken_connection_it_goes_on_from_the_last_change(proxy, ticks, stopping):
    with closing(TickNews(proxy.dsn, look_s=0.05)) as news:
        waited(news, stopping, to_us(NOON))
        waited(news, stopping, ticks(5))
        (seen_ms,) = ticks.connection.execute("select max(rw_timestamp) from changes_of_tick").fetchone()
        proxy.cut()
        assert news.wait(stopping) is None  # the view is asked meanwhile
        waited(news, stopping, ticks(10))
    name = f'declare changes subscription cursor for "{SUBSCRIPTION}"'
    assert proxy.declared == [f"{name} full", f"{name} since {seen_ms}"]


def test_where_the_changes_since_then_are_gone_it_begins_anew(proxy, ticks, stopping, monkeypatch):
    monkeypatch.setattr(tick_news, "_FIRST_PAUSE_S", 0.05)
    with closing(TickNews(proxy.dsn, look_s=0.05)) as news:
        waited(news, stopping, to_us(NOON))
        waited(news, stopping, ticks(5))
        proxy.cut()
        ticks.connection.execute("truncate changes_of_tick")
        time.sleep(0.01)
        waited(news, stopping, ticks(10))
    assert [statement.rpartition('" ')[2].split()[0] for statement in proxy.declared] == ["full", "since", "full"]


def test_without_subscriptions_the_view_is_asked_every_so_often_which_is_said_once(server, ticks, stopping, caplog):
    with caplog.at_level(logging.INFO, "headrace.stream"), closing(TickNews(server.dsn, look_s=0.05)) as news:
        answers = [waited(news, stopping) for _ in range(3)]
    assert [told for told, _ in answers] == [None] * 3
    assert all(took_s >= 0.05 for _, took_s in answers)
    assert [record.message for record in caplog.records] == [
        "ticks are asked for every 0.05 s, as the subscription closed_tick_changes does not tell: "
        "the database has no subscriptions"
    ]


def test_a_subscription_that_is_made_later_is_found(proxy, ticks, stopping, monkeypatch, caplog):
    monkeypatch.setattr(tick_news, "_FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(tick_news, "SUBSCRIPTION", "not_made_yet")
    with caplog.at_level(logging.INFO, "headrace.stream"), closing(TickNews(proxy.dsn, look_s=0.05)) as news:
        assert news.wait(stopping) is None
        monkeypatch.setattr(tick_news, "SUBSCRIPTION", SUBSCRIPTION)
        waited(news, stopping, to_us(NOON))
    assert "subscription not found: not_made_yet" in caplog.messages[0]
    assert caplog.messages[1:] == [f"new ticks are told by the subscription {SUBSCRIPTION}"]


def test_what_is_no_change_is_said(proxy, ticks):
    with closing(Changes.open(proxy.dsn, SUBSCRIPTION)) as changes:
        changes.next()
        ticks.connection.execute("insert into changes_of_tick (closed_tick, op) values (now(), 'Moved')")
        with pytest.raises(HeadraceError, match=r"one of Insert, UpdateInsert, Delete, UpdateDelete; got .* and 'Moved'"):
            changes.next()
    with pytest.raises(psycopg.errors.SyntaxError):
        Changes.open(ticks.connection.info.dsn, SUBSCRIPTION)
