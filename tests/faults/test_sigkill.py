"""SIGKILL at every write boundary: nothing acknowledged is lost, nothing counts twice, every value equals the oracle.

A few kills each in the suite; `make faults` does 50 of each (HEADRACE_KILLS), evenly over all boundaries of one life.
"""

import os
import signal

import numpy as np
import pytest

from streaming_sql.restore import STORE_FOLDER, open_store
from streaming_sql.runner import Runner, RunnerSettings
from tests import forked
from tests.faults import victims
from tests.streaming_sql.generated import typed
from tests.streaming_sql.test_live_store import assert_equals_oracle
from warehouse.clock import ManualClock
from warehouse.events import EVENTS_SCHEMA
from warehouse.features.declarations import load_groups
from warehouse.home import Home
from warehouse.landing import DEAD_LETTERS, EVENTS
from warehouse.time_algebra import FIVE_MINUTES_US, MINUTE_US

START_US = 1_651_766_400_000_000  # 2022-05-05T16:00:00Z
KILLS = int(os.environ.get("HEADRACE_KILLS", "3"))
LIFE_S = 120
GROUPS = load_groups()


@pytest.fixture(scope="module")
def forks():
    """A server that has imported everything and forks victims, so that a life costs what it does and not its imports."""
    forked.import_ahead("tests.faults.victims", "pyiceberg.io.pyarrow", "duckdb_extensions")
    return forked.FORKS


def live(forks, role, folder, name, now_us, crash_at):
    """One life; its exit code."""
    victim = forks.Process(target=victims.run, args=(role, folder, name, now_us, crash_at))
    victim.start()
    victim.join(LIFE_S)
    assert victim.exitcode is not None, f"{role} {name} did not end within {LIFE_S} s"
    return victim.exitcode


def prepare(folder):
    folder.mkdir()
    victims.open_home(folder, ManualClock(START_US))[1].close()
    return folder


def feed_lander(role, folder, name, now_us):
    """A lander has something to land because someone posted before."""
    if role == "lander":
        clock = ManualClock(now_us)
        _, log = victims.open_home(folder, clock)
        for number in range(victims.ROUNDS):
            victims.post(log, folder, f"{name}-{number}", clock)
        log.close()


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("role", victims.ROLES)
def test_killed_at_every_write_boundary_nothing_is_lost_or_counted_twice(role, tmp_path, forks, capsys):
    rehearsal = prepare(tmp_path / "rehearsal")
    feed_lander(role, rehearsal, "x", START_US)
    assert live(forks, role, rehearsal, "x", START_US, 0) == 0
    num_boundaries = int((rehearsal / "boundaries").read_text())
    home = prepare(tmp_path / "home")
    num_killed = 0
    now_us = START_US
    for number, crash_at in enumerate(np.linspace(1, num_boundaries, KILLS).astype(int).tolist()):
        now_us += 2 * FIVE_MINUTES_US
        feed_lander(role, home, f"life{number}", now_us)
        exit_code = live(forks, role, home, f"life{number}", now_us, crash_at)
        assert exit_code in (0, -signal.SIGKILL)
        num_killed += exit_code != 0
    assert num_killed >= max(KILLS * 3 // 5, 1)
    num_events = check(home, now_us + 2 * FIVE_MINUTES_US)
    with capsys.disabled():
        print(
            f"\n{role}: {num_killed} kills over {num_boundaries} write boundaries, {num_events} events, none lost, none twice"
        )


def check(home, now_us):
    """Opens the home once more, lands everything, and holds lake, dead letters and store against what was acknowledged."""
    clock = ManualClock(now_us)
    lake, log = victims.open_home(home, clock)
    store = open_store(Home(home).online / STORE_FOLDER, lake, log, GROUPS)
    runner = Runner(lake, log, store, GROUPS, clock, RunnerSettings(lander=victims.LANDER))
    runner.catch_up()
    runner.step()
    clock.advance_us(FIVE_MINUTES_US + MINUTE_US)
    runner.step()
    runner.flush()
    acknowledged = set((home / "acknowledged").read_text().split()) if (home / "acknowledged").exists() else set()
    rows = lake.scan(EVENTS)
    instants = {name: rows[name].cast("int64").to_pylist() for name in ("event_ts", "landed_at")}
    arrivals = [
        row | {name: values[i] for name, values in instants.items()}
        for i, row in enumerate(rows.select(EVENTS_SCHEMA.names).to_pylist())
    ]
    events = [row for row in arrivals if row["event_type"] != "heartbeat"]
    ids = [row["event_id"] for row in events]
    assert len(ids) == len(set(ids)), "an event landed twice"
    places = [(row["log_partition"], row["log_offset"]) for row in arrivals]
    assert len(places) == len(set(places)), "a position holds two records"
    assert {one for one in acknowledged if not one.endswith("-dead")} <= set(ids), "an acknowledged event is lost"
    payloads = lake.scan(DEAD_LETTERS)["payload"].to_pylist()
    assert len(payloads) == len(set(payloads)), "a dead letter was buried twice"
    dead = {one for one in acknowledged if one.endswith("-dead")}
    assert all(any(f'"{one}"' in payload for payload in payloads) for one in dead), "a dead letter is lost"
    assert_equals_oracle(runner.store.view(), [typed(row) for row in arrivals], clock.now_us() + 1, GROUPS)
    log.close()
    return len(ids)
