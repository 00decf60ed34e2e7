"""A server whose cluster reads another log says so before it answers anything."""

from contextlib import closing
from datetime import timedelta

import pytest

from streaming_sql.event_log import EventLog
from streaming_sql.postgres_reader import PostgresReader
from streaming_sql.same_log import check_same_log
from tests.streaming_sql.generated import START_US
from tests.streaming_sql.postgres import Server
from warehouse.clock import ManualClock
from warehouse.errors import HeadraceError
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import land_records
from warehouse.time_algebra import DAY_US, SECOND_US


@pytest.fixture(scope="module")
def server():
    with Server.started("dev") as server, server.connected() as connection:
        connection.execute(
            "create table newest_arrivals (log_partition int, log_offset bigint, event_id varchar, landed_at timestamptz)"
        )
        yield server


@pytest.fixture
def clock():
    return ManualClock(START_US)


@pytest.fixture
def log(tmp_path, clock):
    """Five events of one reader, a second apart."""
    with closing(EventLog.open(tmp_path / "log", clock=clock)) as log:
        for number in range(5):
            log.append([{"event_id": f"e{number}", "event_type": "click", "user_id": "u", "event_ts": clock.now_us()}])
            clock.advance_us(SECOND_US)
        yield log


@pytest.fixture
def lake(tmp_path):
    return Lake.open(Home(tmp_path / "home"))


@pytest.fixture
def check(server, log, lake):
    """Checks the log against views that know these rows as newest."""

    def told(*rows):
        with server.connected() as connection:
            connection.execute("truncate newest_arrivals")
            for row in rows:
                connection.execute("insert into newest_arrivals values (%s, %s, %s, %s)", row)
        with closing(PostgresReader(server.dsn)) as reader:
            check_same_log(reader, log, lake)

    return told


@pytest.fixture
def events(log):
    """As the views have them: partition, offset, id, landed_at."""
    rows = log.read((0, 0), 10).to_pylist()
    return [(row["log_partition"], row["log_offset"], row["event_id"], row["landed_at"]) for row in rows]


def drop_all(log, clock, events):
    """What is in the log leaves it, as what has landed does."""
    clock.advance_us(2 * DAY_US)
    log.mark_landed(log.end())
    assert log.trim(log.end(), keep_us=DAY_US) == len(events)


def test_views_of_the_same_log_are_believed_however_far_behind_they_are(check, events):
    check()
    check(events[-1])
    check(events[0])


def test_views_of_another_log_are_refused_with_what_is_at_the_place(check, events):
    partition, offset, event_id, landed_at = events[2]
    with pytest.raises(HeadraceError, match=rf"of partition {partition} they know event 'x' of .*, here it is event 'e2' of"):
        check((partition, offset, "x", landed_at))
    with pytest.raises(HeadraceError, match="the views read another log"):  # copied there, later
        check((partition, offset, event_id, landed_at + timedelta(minutes=1)))
    with pytest.raises(HeadraceError, match=r"they know offset 7 of partition ., this one ends at 5; is kafka_topic"):
        check((partition, 7, event_id, landed_at))
    with pytest.raises(HeadraceError, match="they know offset 2 of partition 2, this one has 2 partitions"):
        check((2, offset, event_id, landed_at))


def test_where_the_log_has_dropped_the_event_the_lake_is_asked(check, events, log, lake, clock):
    records = log.read((0, 0), 10)
    drop_all(log, clock, events)
    with pytest.raises(
        HeadraceError,
        match=r"cannot be told: .* landed at 2022.*; the log keeps what is 1 records later, and the lake has no",
    ):
        check(events[-1])
    land_records(lake, records, log.end())
    check(events[-1])
    partition, offset, _, landed_at = events[-1]
    with pytest.raises(HeadraceError, match=r"they know event 'x' of .*, here it is event 'e4'"):
        check((partition, offset, "x", landed_at))
