"""What every event log must do, run over both: SQLite's file, and Kafka's protocol as librdkafka's mock brokers speak it.

The mock keeps messages in memory, leaves the producer's timestamp and deletes nothing, so retention and LogAppendTime are not
tried there.
"""

import threading

import pytest

from streaming_sql.event_log import EventLog
from streaming_sql.kafka_address import KafkaAddress
from streaming_sql.kafka_log import KafkaLog
from streaming_sql.lander import Lander, LanderSettings
from streaming_sql.online_store import OnlineStore
from streaming_sql.records import DeadLetter
from streaming_sql.runner import Runner
from warehouse.clock import ManualClock
from warehouse.errors import HeadraceError
from warehouse.events import EVENTS_SCHEMA, partition_of
from warehouse.features.declarations import load_groups
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import DEAD_LETTERS, EVENTS, create_tables, landed_position
from warehouse.time_algebra import FIVE_MINUTES_US, SECOND_US

START_US = 1_651_766_400_000_000  # 2022-05-05T16:00:00Z


def event(event_id, user_id="u1", **fields):
    return {"event_id": event_id, "event_type": "click", "user_id": user_id, "event_ts": START_US, **fields}


def users_of(partition, count):
    return [name for name in (f"user{i}" for i in range(1000)) if partition_of(name) == partition][:count]


class Place:
    """Where one log is, to be opened any number of times."""

    def __init__(self, kind, folder, clock, request):
        self.kind, self.folder, self.clock, self._opened = kind, folder, clock, []
        if kind == "kafka":
            owner, brokers = request.getfixturevalue("mock_brokers")
            owner.list_topics(folder.name, timeout=10)  # the mock makes a topic when it is asked about it
            self.address = KafkaAddress.parse(f"kafka://{brokers}/{folder.name}?partitions=2&timestamps=create")

    def open(self, **start):
        if self.kind == "kafka":
            log = KafkaLog.open(self.address, clock=self.clock, **start)
        else:
            log = EventLog.open(self.folder, clock=self.clock, **start)
        self._opened.append(log)
        return log

    def close(self):
        for log in self._opened:
            log.close()


@pytest.fixture(scope="session")
def mock_brokers():
    """Three brokers of librdkafka's mock cluster, over TCP on this machine."""
    kafka = pytest.importorskip("confluent_kafka", reason="confluent-kafka is not installed: pip install 'headrace[kafka]'")
    owner = kafka.Producer({"test.mock.num.brokers": 3, "bootstrap.servers": "set by the mock", "log_level": 0})
    yield owner, ",".join(f"{broker.host}:{broker.port}" for broker in owner.list_topics(timeout=10).brokers.values())
    owner.flush(0)


@pytest.fixture
def clock():
    return ManualClock(START_US)


@pytest.fixture(params=["sqlite", "kafka"])
def place(request, tmp_path, clock):
    folder = tmp_path / f"log-{request.param}-{abs(hash(request.node.nodeid))}"
    place = Place(request.param, folder, clock, request)
    yield place
    place.close()


@pytest.fixture
def log(place):
    return place.open()


def read_all(log, position, limit=1000):
    position, rows = list(position), []
    while tuple(position) != log.end():
        for row in log.read(tuple(position), limit).to_pylist():
            assert row["log_offset"] == position[row["log_partition"]], "a gap or a repetition"
            position[row["log_partition"]] += 1
            rows.append(row)
    return rows


def test_a_record_comes_back_as_it_was_appended(log):
    fields = {"note_id": "n1", "properties": {"watch_ms": 7}, "event_ts": START_US - 999_999, "surface": "ü"}
    [(partition, offset)] = log.append([event("e1", **fields)])
    records = log.read(log.start(), 10)
    assert records.schema == EVENTS_SCHEMA
    [row] = records.to_pylist()
    assert (row["event_id"], row["note_id"], row["author_id"], row["properties"]) == ("e1", "n1", None, '{"watch_ms":7}')
    assert (row["log_partition"], row["log_offset"], row["landing"], row["surface"]) == (partition, offset, "log", "ü")
    assert records["event_ts"].cast("int64").to_pylist() == [START_US - 999_999]
    assert records["landed_at"].cast("int64").to_pylist() == [START_US]


def test_a_known_id_is_answered_with_its_first_position(log):
    first = log.append([event("e1"), event("e2"), event("e1", note_id="other")])
    assert first[0] == first[2]
    assert log.append([event("e2"), event("e1")]) == [first[1], first[0]]
    assert sum(log.end()) == 2


def test_an_event_that_is_none_stores_nothing(log):
    with pytest.raises(HeadraceError, match="event 1: event_ts needs a zone"):
        log.append([event("e1"), event("e2", event_ts="2022-05-05 16:00")])
    with pytest.raises(HeadraceError, match="event 0: event_type 'dead_letter' is written by the log alone"):
        log.append([event("e1", event_type="dead_letter")])
    assert sum(log.end()) == 0


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_reading_in_pieces_skips_nothing_repeats_nothing_and_landing_times_never_fall(log, clock, limit):
    for i in range(30):
        log.append([event(f"e{i}", user_id=f"user{i % 7}")])
        clock.advance_us([0, 5_000, -3_000][i % 3])
    rows = read_all(log, log.start(), limit)
    assert sorted(row["event_id"] for row in rows) == sorted(f"e{i}" for i in range(30))
    for partition in (0, 1):
        landed = [row["landed_at"] for row in rows if row["log_partition"] == partition]
        assert landed == sorted(landed)


def test_a_reader_sees_the_same_from_any_position_after_any_opening(place, clock):
    log = place.open()
    for i in range(12):
        log.append([event(f"e{i}", user_id=users_of(i % 2, 1)[0])])
        clock.advance_us(-1_000_000 if i == 5 else 2_000)
    whole = {(row["log_partition"], row["log_offset"]): row for row in read_all(log, (0, 0))}
    for partition in (0, 1):
        log.mark_landed((3, 4))
        other = place.open()
        start = [6, 6]
        start[partition] = 5
        assert [whole[partition, 5]] == other.read(tuple(start), 10).to_pylist()


def test_two_threads_read_at_their_own_places(log):
    log.append([event(f"e{i}", user_id=f"user{i}") for i in range(300)])
    seen = {}

    def work(name, limit):
        seen[name] = [row["event_id"] for row in read_all(log, (0, 0), limit)]

    threads = [threading.Thread(target=work, args=arguments) for arguments in (("slow", 7), ("fast", 100))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen["slow"]) == sorted(seen["fast"]) == sorted(f"e{i}" for i in range(300))


def test_only_idle_partitions_get_a_heartbeat(log, clock):
    log.append([event("e1", user_id=users_of(0, 1)[0])])
    assert log.heartbeat(SECOND_US) == 1
    clock.advance_us(SECOND_US - 1_000)
    assert log.heartbeat(SECOND_US) == 0
    clock.advance_us(1_000)
    assert log.heartbeat(SECOND_US) == 2
    assert log.read_through_us() == (START_US + SECOND_US,) * 2


def test_named_readers_keep_their_own_positions(place):
    log = place.open()
    log.append([event(f"e{i}", user_id=users_of(i % 2, 1)[0]) for i in range(8)])
    assert log.committed("features") is None
    log.commit("features", (3, 1))
    log.commit("audit", (1, 4))
    log.commit("features", (4, 2))
    other = place.open()
    assert (other.committed("features"), other.committed("audit")) == ((4, 2), (1, 4))


def test_a_new_log_continues_where_the_lake_ends(place):
    log = place.open(start=(70, 90), not_before_us=START_US + SECOND_US)
    assert log.end() == (70, 90)
    positions = dict(log.append([event(f"e{i}", user_id=users_of(i, 1)[0]) for i in range(2)]))
    assert positions == {0: 70, 1: 90}
    assert log.read((70, 90), 10)["landed_at"].cast("int64").to_pylist() == [START_US + SECOND_US] * 2
    log.mark_landed((71, 90))
    again = place.open()
    assert (again.landed(), again.end()) == ((71, 90), (71, 91))
    with pytest.raises(HeadraceError, match="read the lake first"):
        again.read((69, 90), 10)


def test_renumbered_records_keep_their_order_and_ids(log):
    user = users_of(0, 1)[0]
    log.append([event(f"e{i}", user_id=user) for i in range(5)])
    log.mark_landed((2, 0))
    log.renumber((4, 7), not_before_us=START_US + 5_000)
    records = log.read((4, 7), 10)
    assert records["event_id"].to_pylist() == ["e2", "e3", "e4"]
    assert records["log_offset"].to_pylist() == [4, 5, 6]
    assert records["landed_at"].cast("int64").to_pylist() == [START_US + 5_000] * 3
    assert (log.end(), log.landed()) == ((7, 7), (4, 7))
    assert log.ids(0, 4, 6) == {4: "e2", 5: "e3"}
    assert log.offset_of(0, 2 if isinstance(log, KafkaLog) else 4) == 4


def test_what_is_no_event_is_buried_with_its_reason_and_counts_nowhere(place, tmp_path, clock):
    lake = Lake.open(Home(tmp_path))
    create_tables(lake)
    log = place.open()
    log.append([event("e1")])
    log.append_dead_letters([DeadLetter("line 3 is no JSON", '{"eventId": "x'), DeadLetter("userId: missing", "{}")])
    if place.kind == "kafka":
        log._producer.produce(place.address.topic, value=b"\xffnot json", partition=0, timestamp=START_US // 1000)
        log._producer.flush(10)
    log.append([event("e2")])
    groups = load_groups()
    runner = Runner(lake, log, OnlineStore.from_lake(lake, groups), groups, clock)
    runner.catch_up()
    runner.flush()
    strangers = 1 if place.kind == "kafka" else 0
    assert (runner.totals.num_events, runner.totals.num_dead) == (2, 2 + strangers)
    letters = {row["reason"]: row["payload"] for row in lake.scan(DEAD_LETTERS).to_pylist()}
    assert letters["line 3 is no JSON"] == '{"eventId": "x'
    assert letters["userId: missing"] == "{}"
    assert len(letters) == 2 + strangers
    landed = lake.scan(EVENTS)
    assert sorted(i for i in landed["event_id"].to_pylist() if i.startswith("e")) == ["e1", "e2"]
    assert "dead_letter" not in landed["event_type"].to_pylist()


def test_a_runner_that_is_opened_again_lands_everything_once(place, tmp_path, clock):
    lake, groups = Lake.open(Home(tmp_path)), load_groups()
    create_tables(lake)
    for round_number in range(3):
        log = place.open(start=landed_position(lake))
        runner = Runner(lake, log, OnlineStore.from_lake(lake, groups), groups, clock)
        runner.catch_up()
        for i in range(20):
            log.append([event(f"{round_number}-{i}", user_id=f"user{i}", note_id="n1", event_ts=clock.now_us())])
        clock.advance_us(FIVE_MINUTES_US)
        runner.step()
        if round_number == 1:
            Lander(lake, log, clock, LanderSettings(rows=10)).step(flush=True)
        matrix = runner.store.view().assemble("user_activity", [("user3",)], clock.now_us() + 1)
        assert dict(zip(matrix.names, matrix.values[0].tolist(), strict=True))["user_num_clicks_1d"] == round_number + 1
    runner.flush()
    clicks = [one for one in lake.scan(EVENTS).to_pylist() if one["event_type"] == "click"]
    assert sorted(one["event_id"] for one in clicks) == sorted(f"{r}-{i}" for r in range(3) for i in range(20))
    assert sum(landed_position(lake)) == sum(log.end())
