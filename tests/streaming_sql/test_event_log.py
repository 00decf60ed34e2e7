"""The event log: durable when acknowledged, first arrival wins, no reader skips, landed_at never falls."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from streaming_sql.event_log import EventLog
from warehouse.clock import ManualClock
from warehouse.errors import HeadraceError
from warehouse.events import EVENTS_SCHEMA, partition_of
from warehouse.time_algebra import DUPLICATE_MEMORY_US, SECOND_US

START_US = 1_651_766_400_000_000  # 2022-05-05T16:00:00Z


def event(event_id, user_id="u1", **fields):
    return {"event_id": event_id, "event_type": "click", "user_id": user_id, "event_ts": START_US, **fields}


def users_of(partition, count):
    return [name for name in (f"user{i}" for i in range(1000)) if partition_of(name) == partition][:count]


@pytest.fixture
def clock():
    return ManualClock(START_US)


@pytest.fixture
def log(tmp_path, clock):
    log = EventLog.open(tmp_path, clock=clock)
    yield log
    log.close()


def test_a_record_comes_back_with_the_columns_of_the_lake(log):
    event_ts = "2022-05-05T15:59:59.000001Z"
    [(partition, offset)] = log.append([event("e1", note_id="n1", properties={"watch_ms": 7}, event_ts=event_ts)])
    records = log.read((0, 0), 10)
    assert records.schema == EVENTS_SCHEMA
    [row] = records.to_pylist()
    assert (row["event_id"], row["note_id"], row["author_id"], row["properties"]) == ("e1", "n1", None, '{"watch_ms":7}')
    assert (row["log_partition"], row["log_offset"], row["landing"]) == (partition, offset, "log")
    assert records["event_ts"].cast("int64").to_pylist() == [START_US - 999_999]
    assert records["landed_at"].cast("int64").to_pylist() == [START_US]


def test_a_known_id_is_answered_with_its_first_position_and_not_stored_again(log, clock):
    first = log.append([event("e1"), event("e2"), event("e1", note_id="other")])
    assert first[0] == first[2]
    clock.advance_us(DUPLICATE_MEMORY_US)
    assert log.append([event("e1")]) == [first[0]]
    assert sum(log.end()) == 2


def test_an_id_is_forgotten_after_the_duplicate_memory(log, clock):
    [first] = log.append([event("e1")])
    clock.advance_us(DUPLICATE_MEMORY_US + 1)
    assert log.append([event("e1")]) != [first]


def test_landed_at_never_falls_in_a_partition_when_the_clock_steps_back(log, clock):
    log.append([event("e1")])
    clock.advance_us(-60 * SECOND_US)
    log.append([event("e2")])
    clock.advance_us(90 * SECOND_US)
    log.append([event("e3")])
    assert log.read((0, 0), 10)["landed_at"].cast("int64").to_pylist() == [START_US, START_US, START_US + 30 * SECOND_US]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_reading_in_pieces_skips_nothing_and_repeats_nothing(log, clock, limit):
    for i in range(40):
        log.append([event(f"e{i}", user_id=f"user{i % 7}")])
        clock.advance_us([0, 5, -3][i % 3])
    position, seen = [0, 0], []
    while (records := log.read(tuple(position), limit)).num_rows:
        order = list(zip(*(records[name].to_pylist() for name in ("landed_at", "log_partition", "log_offset")), strict=True))
        assert order == sorted(order)
        for _, partition, offset in order:
            assert offset == position[partition]
            position[partition] += 1
        seen += records["event_id"].to_pylist()
    assert sorted(seen) == sorted(f"e{i}" for i in range(40))
    assert tuple(position) == log.end()


def test_only_idle_partitions_get_a_heartbeat(log, clock):
    log.append([event("e1", user_id=users_of(0, 1)[0])])
    assert log.heartbeat(SECOND_US) == 1  # partition 1 has been silent for ever
    clock.advance_us(SECOND_US - 1)
    assert log.heartbeat(SECOND_US) == 0
    clock.advance_us(1)
    assert log.heartbeat(SECOND_US) == 2
    beats = log.read((0, 0), 10).filter(log.read((0, 0), 10)["event_type"].to_numpy(zero_copy_only=False) == "heartbeat")
    assert beats["log_partition"].to_pylist() == [1, 0, 1]
    assert log.read_through_us() == (START_US + SECOND_US,) * 2


def test_a_new_log_continues_where_the_lake_ends(tmp_path, clock):
    log = EventLog.open(tmp_path, clock=clock, start=(70, 90), not_before_us=START_US + SECOND_US)
    positions = dict(log.append([event(f"e{i}", user_id=users_of(i, 1)[0]) for i in range(2)]))
    assert positions == {0: 70, 1: 90}
    assert log.read_through_us() == (START_US + SECOND_US,) * 2
    with pytest.raises(HeadraceError, match="keeps records from"):
        log.read((0, 90), 10)


def test_renumbered_records_keep_their_order_and_their_ids(log, clock):
    user = users_of(0, 1)[0]
    log.append([event(f"e{i}", user_id=user) for i in range(5)])
    log.mark_landed((2, 0))
    log.renumber((4, 7), not_before_us=START_US + 5)
    records = log.read((4, 7), 10)
    assert records["event_id"].to_pylist() == ["e2", "e3", "e4"]
    assert records["log_offset"].to_pylist() == [4, 5, 6]
    assert records["landed_at"].cast("int64").to_pylist() == [START_US + 5] * 3
    assert log.end() == (7, 7)
    assert log.landed() == (4, 7)
    assert log.append([event("e3", user_id=user), event("e5", user_id=user)]) == [(0, 5), (0, 7)]
    assert log.read_through_us() == (START_US + 5,) * 2


def test_a_log_keeps_its_number_of_partitions(tmp_path, clock):
    EventLog.open(tmp_path, clock=clock).close()
    with pytest.raises(HeadraceError, match="has 2 partitions, asked for 3"):
        EventLog.open(tmp_path, num_partitions=3, clock=clock)


def test_a_file_that_is_no_log_is_named(tmp_path, clock):
    (tmp_path / "events.db").write_text("this is not a database, and it is long enough to be looked at as one" * 20)
    with pytest.raises(HeadraceError, match="cannot open the event log"):
        EventLog.open(tmp_path, clock=clock)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"event_id": None}, "event_id is missing"),
        ({"event_ts": "2022-05-05 16:00"}, "event_ts needs a zone"),
        ({"event_ts": "yesterday"}, "event_ts must look like"),
        ({"event_ts": -1}, "between 1970 and 9999"),
        ({"event_type": "heartbeat"}, "written by the log alone"),
        ({"properties": "[1]"}, "properties must be a JSON object"),
        ({"note_id": 5}, "note_id must be a string, got int"),
        ({"note_id": "\ud800"}, "lone surrogate"),
        ({"landed_at": START_US}, "unknown fields"),
        ({"retracts": "e0"}, "retracts belongs to a retraction"),
        ({"event_type": "retraction"}, "names the event_id that it takes back"),
        ({"event_type": "retraction", "retracts": 5}, "retracts must be a string"),
    ],
)
def test_one_bad_event_stops_its_batch_and_is_named(log, bad, said):
    with pytest.raises(HeadraceError, match=f"event 1: .*{said}"):
        log.append([event("e1"), event("e2") | bad])
    assert log.end() == (0, 0)


def test_concurrent_appends_share_commits_and_lose_nothing(tmp_path):
    log = EventLog.open(tmp_path)
    answers = {}

    def work(worker):
        for i in range(20):
            answers[worker, i] = log.append([event(f"{worker}-{i}-{j}", user_id=f"user{j}") for j in range(3)])

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = log.read((0, 0), 10_000)
    stored = dict(
        zip(
            records["event_id"].to_pylist(),
            zip(records["log_partition"].to_pylist(), records["log_offset"].to_pylist(), strict=True),
            strict=True,
        )
    )
    assert stored == {
        f"{worker}-{i}-{j}": position for (worker, i), positions in answers.items() for j, position in enumerate(positions)
    }
    assert log.num_commits < 160
    log.close()


def test_landed_records_are_dropped_by_age_and_their_ids_are_still_known(log, clock):
    user = users_of(0, 1)[0]
    first = log.append([event(f"e{i}", user_id=user) for i in range(5)])
    clock.advance_us(100 * SECOND_US)
    log.append([event("e5", user_id=user)])
    assert log.trim((3, 0), keep_us=50 * SECOND_US) == 3
    assert log.read((3, 0), 10)["event_id"].to_pylist() == ["e3", "e4", "e5"]
    with pytest.raises(HeadraceError, match="read the lake first"):
        log.read((2, 0), 10)
    assert log.append([event("e0", user_id=user)]) == [first[0]]


def test_a_read_that_found_nothing_asks_the_records_again_only_when_the_file_has_changed(tmp_path, clock, log):
    other = EventLog.open(tmp_path, clock=clock)
    asked = []
    log._reader.set_trace_callback(asked.append)
    assert [log.read((0, 0), 10).num_rows for _ in range(3)] == [0, 0, 0]
    assert sum("from records" in sql for sql in asked) == 1
    user = users_of(0, 1)[0]
    for number, appending in enumerate((other, log, other)):
        appending.append([event(f"e{number}", user_id=user)])
        assert log.read((number, 0), 10)["event_id"].to_pylist() == [f"e{number}"]
        assert log.read((number + 1, 0), 10).num_rows == 0
    assert log.read((1, 0), 10)["event_id"].to_pylist() == ["e1", "e2"]
    other.trim((3, 0), keep_us=-1)
    for _ in range(2):
        with pytest.raises(HeadraceError, match="read the lake first"):
            log.read((2, 0), 10)
    other.close()


def test_landed_records_are_dropped_by_size(log, clock):
    user = users_of(0, 1)[0]
    log.append([event(f"e{i}", user_id=user, properties={"text": "x" * 1000}) for i in range(500)])
    assert log.trim((400, 0), keep_us=10**15, max_bytes=10**9) == 0
    assert log.trim((400, 0), keep_us=10**15, max_bytes=100_000) == 400
    assert log.end() == (500, 0)


APPEND_UNTIL_KILLED = """
import sys
from pathlib import Path
from streaming_sql.event_log import EventLog
log = EventLog.open(Path(sys.argv[1]))
i = 0
while True:
    batch = [dict(event_id=f"{sys.argv[2]}-{i + j}", event_type="view", user_id=f"user{j}", event_ts=10**15) for j in range(5)]
    for one, (partition, offset) in zip(batch, log.append(batch)):
        print(one["event_id"], partition, offset, flush=True)
    i += 5
"""


def test_every_acknowledged_event_survives_sigkill_of_two_appending_processes(tmp_path):
    command = [sys.executable, "-c", APPEND_UNTIL_KILLED, str(tmp_path)]
    children = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in ("a", "b")]
    acknowledged = [[child.stdout.readline() for _ in range(20)] for child in children]
    time.sleep(0.3)
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
    for lines, child in zip(acknowledged, children, strict=True):
        lines += [line for line in child.stdout if line.endswith("\n")]
        child.stdout.close()
        assert child.wait() == -signal.SIGKILL
    log = EventLog.open(tmp_path)
    records = log.read((0, 0), 1_000_000)
    stored = {
        (row["event_id"], row["log_partition"], row["log_offset"])
        for row in records.select(["event_id", "log_partition", "log_offset"]).to_pylist()
    }
    told = {
        (name, int(partition), int(offset)) for name, partition, offset in map(str.split, acknowledged[0] + acknowledged[1])
    }
    assert told <= stored
    assert len(told) > 40
    assert len(stored) - len(told) <= 10  # at most one unacknowledged batch of five per process
    assert sum(log.end()) == len(stored)
    log.append([event("after")])
    log.close()
