"""Clocks that step back, duplicates by the thousand, a full disk: the log stays right, or says what is wrong and stays
whole."""

import multiprocessing
import resource
import signal
import threading

import pytest

from streaming_sql.event_log import EventLog
from streaming_sql.lander import Lander
from streaming_sql.online_store import OnlineStore
from streaming_sql.runner import Runner, RunnerSettings
from tests.faults import victims
from tests.faults.test_sigkill import GROUPS, START_US, check, prepare
from warehouse.clock import Clock, ManualClock
from warehouse.errors import HeadraceError
from warehouse.landing import EVENTS
from warehouse.time_algebra import HOUR_US, MINUTE_US, SECOND_US


def test_a_clock_that_steps_back_again_and_again_loses_nothing_and_moves_no_tick_back(tmp_path):
    home = prepare(tmp_path / "home")
    clock = ManualClock(START_US)
    lake, log = victims.open_home(home, clock)
    runner = Runner(lake, log, OnlineStore.from_lake(lake, GROUPS), GROUPS, clock, RunnerSettings(lander=victims.LANDER))
    runner.catch_up()
    ticks = []
    for number, step_us in enumerate([100, -50, 400, -HOUR_US // SECOND_US, 30, 4000, -1, 900]):
        clock.advance_us(step_us * SECOND_US)
        victims.post(log, home, f"step{number}", clock)
        ticks.append(runner.step().tick_us)
    assert ticks == sorted(ticks)
    landed = log.read(log.start(), 10_000)
    for partition in (0, 1):
        own = landed.filter(landed["log_partition"].to_numpy() == partition)["landed_at"].cast("int64").to_pylist()
        assert own == sorted(own)
    log.close()
    assert check(home, START_US + 3 * HOUR_US) == 8 * 6


def test_duplicates_by_the_thousand_from_many_threads_count_once(tmp_path):
    home = prepare(tmp_path / "home")
    clock = ManualClock(START_US + MINUTE_US)
    _, log = victims.open_home(home, clock)
    batches = [victims.batch(f"dup{number}", clock) for number in range(10)]
    first = [log.append(events) for events in batches]
    answers = []

    def repeat():
        for _ in range(25):
            answers.extend((number, log.append(events)) for number, events in enumerate(batches))

    threads = [threading.Thread(target=repeat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) * len(batches[0]) == 8_000
    assert all(positions == first[number] for number, positions in answers)
    log.close()
    assert check(home, START_US + HOUR_US) == 10 * 6


def fill_up(folder, told):
    """Appends until no file may grow, then lets files grow again and goes on."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    log = EventLog.open(folder, clock=Clock())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    taken, refused = [], 0
    for number in range(400):
        event = {"event_id": f"e{number}", "event_type": "view", "user_id": f"u{number}", "event_ts": Clock().now_us()}
        try:
            log.append([event | {"properties": {"text": "x" * 4000}}])
            taken.append(event["event_id"])
        except HeadraceError:
            refused += 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.append([{"event_id": "after", "event_type": "view", "user_id": "u", "event_ts": Clock().now_us()}])
    told.send((taken, refused))


def test_when_files_cannot_grow_events_are_refused_and_what_was_acknowledged_stays(tmp_path):
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    child = context.Process(target=fill_up, args=(tmp_path, theirs))
    child.start()
    assert ours.poll(120)
    taken, refused = ours.recv()
    child.join(30)
    assert refused > 0
    log = EventLog.open(tmp_path)
    ids = log.read(log.start(), 10_000)["event_id"].to_pylist()
    assert sorted(ids) == sorted([*taken, "after"])
    log.close()


def test_a_lake_that_cannot_be_written_leaves_everything_in_the_log(tmp_path, monkeypatch):
    home = prepare(tmp_path / "home")
    clock = ManualClock(START_US + MINUTE_US)
    lake, log = victims.open_home(home, clock)
    victims.post(log, home, "full", clock)
    lander = Lander(lake, log, clock, victims.LANDER)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            lander.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert lake.scan(EVENTS).num_rows == 0
    log.close()
    assert check(home, START_US + HOUR_US) == 6


POISONS = [
    {"event_ts": START_US, "properties": '{"watch_ms": 99999999999999999999}'},
    {"properties": '{"watch_ms": {"deep": [[[[1]]]]}}'},
    {"properties": '{"watch_ms": "12\\u0000"}'},
    {"user_id": "u1", "note_id": "n\u0000", "author_id": "a'; drop table staged; --"},
    {"user_id": "\U0001f4a5" * 1000, "event_type": "click"},
    {"event_type": "no such type", "retracts": None},
    {"event_type": "retraction", "retracts": "poison-0"},
    {"event_type": "retraction", "retracts": "nothing that ever was"},
    {"event_ts": START_US - HOUR_US, "impression_id": "", "note_id": ""},
]


def test_one_poison_event_in_a_batch_takes_nothing_else_with_it(tmp_path):
    home = prepare(tmp_path / "home")
    clock = ManualClock(START_US + MINUTE_US)
    _, log = victims.open_home(home, clock)
    for number, poison in enumerate(POISONS):
        event = {"event_id": f"poison-{number}", "event_type": "watch", "user_id": "u2", "note_id": "n1", "author_id": "a1"}
        log.append([*victims.batch(f"p{number}", clock), event | {"event_ts": clock.now_us()} | poison])
        clock.advance_us(40 * SECOND_US)
    log.close()
    assert check(home, START_US + HOUR_US) == len(POISONS) * 7


@pytest.mark.parametrize(
    "bad", [{"event_ts": "soon"}, {"event_ts": 1.5}, {"note_id": "\ud800"}, {"colour": 1}, {"event_id": ""}]
)
def test_what_the_log_cannot_hold_is_refused_by_name_with_its_batch_and_the_log_goes_on(tmp_path, bad):
    home = prepare(tmp_path / "home")
    clock = ManualClock(START_US + MINUTE_US)
    _, log = victims.open_home(home, clock)
    event = {"event_id": "bad", "event_type": "view", "user_id": "u1", "event_ts": clock.now_us()}
    with pytest.raises(HeadraceError, match=str(next(iter(bad)))):
        log.append([*victims.batch("with", clock), event | bad])
    assert sum(log.end()) == sum(log.start())
    victims.post(log, home, "after", clock)
    log.close()
    assert check(home, START_US + HOUR_US) == 6
