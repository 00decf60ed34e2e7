"""A server that reads features from RisingWave: tables of the views' shape on a real PostgreSQL, filled by the batch build.

The database lags, goes away, hangs and comes back; a page is answered each time, and what was served is what the lake says.
"""

import dataclasses
import logging
import re
import time

import psycopg
import pytest
from psycopg.types.json import Jsonb

from serving.app import create_app
from serving.engine import Engine
from serving.parity import check_parity
from serving.settings import Settings
from streaming_sql.block_views import BlockViews
from streaming_sql.cluster import AWAY, STALE
from tests.serving.hand_made import START, build_features, furnish, running, until_ready
from tests.streaming_sql.postgres import Server
from warehouse.clock import ManualClock
from warehouse.errors import HeadraceError
from warehouse.features.declarations import load_groups
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.time_algebra import DAY_US, FIVE_MINUTES_US, GRACE_US, HOUR_US, newest_tick

GROUPS = load_groups()
LOOK_S, TIMEOUT_MS = 0.1, 500.0


class Views:
    """Tables in place of the views: what the lake's batch build holds up to a tick."""

    def __init__(self, server: Server):
        self.server, self.tick_us = server, 0
        columns = BlockViews(GROUPS).columns
        with server.connected() as connection:
            connection.execute("create table closed_tick (closed_tick timestamptz)")
            connection.execute(
                "create table newest_arrivals (log_partition int, log_offset bigint, event_id varchar, landed_at timestamptz)"
            )
            for name in GROUPS:
                typed = ", ".join(f"{column} {kind}" for column, kind in columns(name).items())
                connection.execute(f"create table {name} ({typed})")

    def fill(self, lake: Lake, tick_us: int) -> None:
        """Moves to a tick that the lake's features are built up to."""
        with self.server.connected() as connection, connection.transaction(), lake.duckdb() as batch:
            for name in GROUPS:
                known = f"known_at > make_timestamptz({self.tick_us}) and known_at <= make_timestamptz({tick_us})"
                rows = batch.execute(f"select * from features.{name} where {known}").to_arrow_table()
                with connection.cursor().copy(f"copy {name} ({', '.join(rows.column_names)}) from stdin") as copy:
                    for row in rows.to_pylist():
                        copy.write_row([stored(value) for value in row.values()])
            connection.execute("delete from newest_arrivals")
            newest = "from lake.events qualify row_number() over (partition by log_partition order by log_offset desc) = 1"
            for row in batch.execute(f"select log_partition, log_offset, event_id, landed_at {newest}").fetchall():
                connection.execute("insert into newest_arrivals values (%s, %s, %s, %s)", row)
            connection.execute("delete from closed_tick")
            connection.execute("insert into closed_tick values (to_timestamp(%s))", [tick_us / 1e6])
        self.tick_us = tick_us


def stored(value):
    """Events as the views store them: JSON, newest first."""
    if not isinstance(value, list):
        return value
    return [Jsonb({**entry, "event_ts": entry["event_ts"].isoformat()}) for entry in reversed(value)]


@pytest.fixture(scope="module")
def clock():
    return ManualClock(round(START.timestamp()) * 1_000_000 + DAY_US + HOUR_US)


@pytest.fixture(scope="module")
def views():
    with Server.started("dev") as server:
        yield Views(server)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("home"))
    furnish(home, num_users=180, num_notes=120, days=1)
    return home


@pytest.fixture(scope="module")
def server(home, clock, views):
    """Serves from the views; its tick is theirs."""
    views.fill(Lake.open(home), newest_tick(round(START.timestamp()) * 1_000_000 + DAY_US - HOUR_US))
    settings = dataclasses.replace(
        Settings.load(), features="risingwave", features_timeout_ms=TIMEOUT_MS, features_look_s=LOOK_S, logged_share=1.0
    )
    settings = dataclasses.replace(settings, l1_top_k=60, deadline_ms=60_000.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RISINGWAVE_DSN", views.server.dsn)
        with running(create_app(home, clock, settings)) as server:
            until_ready(server)
            yield server


@pytest.fixture
def next_tick(server, clock, views):
    """Lands and builds what there is, and waits until the server is at the views' next tick."""

    def move():
        clock.advance_us(2 * FIVE_MINUTES_US + GRACE_US)
        server.engine.log.heartbeat()
        server.engine.runner.flush()
        lake = Lake.open(server.engine.home)
        build_features(lake)
        views.fill(lake, newest_tick(clock.now_us()) - FIVE_MINUTES_US)
        deadline = time.monotonic() + 20
        while server.engine.world.store.view().tick_us < views.tick_us:
            assert time.monotonic() < deadline, "the tick does not move"
            time.sleep(0.02)

    return move


def numbered():
    number = 0
    while True:
        number += 1
        yield f"rw-{number}"


IDS = numbered()


def click(server, user_id, note_id):
    answer = server.post("/v1/events", {"eventId": next(IDS), "eventType": "click", "userId": user_id, "noteId": note_id})
    assert answer.status_code == 202, answer.text
    server.engine.clock.advance_us(1000)


def features_of(server, page):
    return server.explain(page["requestId"])["userFeatures"]


def until(said):
    deadline = time.monotonic() + 20
    while not said():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_served_is_what_the_lake_says_at_the_clusters_tick(server, views, next_tick):
    busy = [user_id for user_id, _ in server.engine.world.readers.most_active(4)]
    for tick in range(2):
        for user_id in (*busy, "rw-newcomer"):
            page = server.feed(user_id)
            assert page["degraded"] == []
            assert server.engine.world.store.view().tick_us == views.tick_us
            before = features_of(server, page)["user_num_clicks_7d"]
            click(server, user_id, page["notes"][0]["noteId"])
            again = server.feed(user_id)
            assert features_of(server, again)["user_num_clicks_7d"] == before + 1
        if tick == 0:
            next_tick()
    busiest = features_of(server, server.feed(busy[0]))
    assert busiest["user_num_views_7d"] > 5
    next_tick()
    assert server.engine.forward_log.flush()
    parity = check_parity(Lake.open(server.engine.home))
    assert parity.agrees, parity.as_text()
    assert parity.skipped == {}
    assert parity.vectors_of_group["user_author_affinity"] > 100
    assert parity.vectors_of_group["user_activity"] == 21


def test_while_the_database_is_away_pages_come_of_the_last_tick_and_say_so(server, views, next_tick):
    known, unknown = [user_id for user_id, _ in server.engine.world.readers.most_active(6)][4:]
    told = features_of(server, server.feed(known))
    views.server.kill()
    try:
        until(lambda: server.feed(known)["degraded"])
        page = server.feed(known)
        assert (page["degraded"], len(page["notes"])) == ([AWAY], 20)
        assert features_of(server, page) == told
        other = server.feed(unknown)
        assert (other["degraded"], len(other["notes"])) == ([AWAY, STALE], 20)
        click(server, known, page["notes"][0]["noteId"])  # events go on counting
        assert features_of(server, server.feed(known))["user_num_clicks_7d"] == told["user_num_clicks_7d"] + 1
        ready = server.get("/readyz")
        assert (ready.status_code, ready.json()["missing"]) == (200, [])
        assert "RisingWave has not answered for 0:00:" in ready.json()["degraded"][0]
        away_s = re.search(r"^headrace_features_away_seconds (\S+)$", server.get("/metrics").text, re.M)
        assert float(away_s[1]) > 0
    finally:
        views.server.start()
    until(lambda: server.feed(unknown)["degraded"] == [])
    assert server.feed(known)["degraded"] == []
    assert server.get("/readyz").json()["degraded"] == []
    next_tick()
    assert server.engine.forward_log.flush()
    parity = check_parity(Lake.open(server.engine.home))
    assert parity.agrees, parity.as_text()
    assert set(parity.skipped) == {"RisingWave did not answer, and the reader's own features were of an earlier tick"}


def test_a_database_that_hangs_costs_one_bounded_wait(server, views, next_tick):
    reader, other, third = "rw-hang-1", "rw-hang-2", "rw-hang-3"
    assert server.feed(reader)["degraded"] == []
    with views.server.hanging():
        began = time.monotonic()
        assert STALE in server.feed(other)["degraded"]
        assert time.monotonic() - began < 10 * TIMEOUT_MS / 1000
        began = time.monotonic()
        for user_id in (reader, other, third):
            assert AWAY in server.feed(user_id)["degraded"]
        assert time.monotonic() - began < 10 * TIMEOUT_MS / 1000
    until(lambda: server.feed(third)["degraded"] == [])
    next_tick()
    assert server.engine.forward_log.flush()
    parity = check_parity(Lake.open(server.engine.home))
    assert parity.agrees, parity.as_text()
    assert parity.vectors_of_group["user_activity"] > 1


def test_a_cluster_that_falls_behind_its_own_tick_is_not_believed(server, views):
    """One that is made anew closes old ticks again, and its rows are not all there."""
    with views.server.connected() as connection:
        connection.execute("update closed_tick set closed_tick = closed_tick - interval '1 hour'")
        assert STALE in server.feed("rw-behind")["degraded"]
        connection.execute("update closed_tick set closed_tick = closed_tick + interval '1 hour'")
    until(lambda: server.feed("rw-behind")["degraded"] == [])


@pytest.mark.parametrize(
    ("dsn", "said"),
    [
        ("", "features: risingwave needs the cluster's address in RISINGWAVE_DSN"),
        ("host=/nowhere password=s3cret dbname=dev", "the database at /nowhere:5432/dev did not answer"),
        ("s3cret", "the database's address is no connection string"),
    ],
)
def test_a_server_without_its_cluster_says_what_it_lacks_and_no_secret(home, clock, monkeypatch, caplog, tmp_path, dsn, said):
    monkeypatch.setenv("RISINGWAVE_DSN", dsn)
    engine = Engine(home, clock, dataclasses.replace(Settings.load(), features="risingwave"))
    with caplog.at_level(logging.DEBUG), pytest.raises(HeadraceError, match=said) as raised:
        engine._cluster(GROUPS).open_store(lambda: (0, 0))
    assert "s3cret" not in caplog.text + str(raised.value)


def test_the_environment_chooses_where_features_come_from(monkeypatch):
    assert Settings.from_env().features == "embedded"
    monkeypatch.setenv("HEADRACE_FEATURES", "risingwave")
    assert Settings.from_env().features == "risingwave"
    monkeypatch.setenv("HEADRACE_FEATURES", "postgres")
    with pytest.raises(HeadraceError, match="must be embedded or risingwave, got 'postgres'"):
        Settings.from_env()


def test_views_that_are_not_there_are_said(home, clock, monkeypatch):
    with Server.started("empty") as empty:
        monkeypatch.setenv("RISINGWAVE_DSN", empty.dsn)
        engine = Engine(home, clock, dataclasses.replace(Settings.load(), features="risingwave"))
        with pytest.raises(HeadraceError, match=r"refuses the statement: .*closed_tick.* does not exist"):
            engine._cluster(GROUPS).open_store(lambda: (0, 0))
        with psycopg.connect(empty.dsn) as connection:
            assert connection.execute("select 1").fetchone() == (1,)
