"""What is killed: the write path of the collector, of the lander and of the whole runner, each in a process of its own.

An acknowledgement is one line in the file `acknowledged`, written after the log has answered.
"""

import os
from pathlib import Path

from streaming_sql.event_log import EventLog
from streaming_sql.lander import Lander, LanderSettings
from streaming_sql.published import Publisher
from streaming_sql.restore import STORE_FOLDER, open_store
from streaming_sql.runner import Runner, RunnerSettings
from tests.faults.crash_points import install
from warehouse.clock import ManualClock
from warehouse.features.declarations import load_groups
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import create_tables, landed_position
from warehouse.time_algebra import DAY_US, DUPLICATE_MEMORY_US, SECOND_US

LANDER = LanderSettings(rows=10, age_us=30 * SECOND_US, keep_us=DAY_US)
ROUNDS = 4


def batch(name: str, clock: ManualClock) -> list[dict]:
    """Seven events; one is late, one repeats an id, one is a dead letter, one is taken back."""
    now_us = clock.now_us()
    events = [
        {
            "event_id": f"{name}-{i}",
            "event_type": ("view", "click", "watch", "click", "like")[i],
            "user_id": f"u{1 + i % 2}",
            "note_id": f"n{1 + i // 3}",
            "author_id": "a1",
            "event_ts": now_us - (0, SECOND_US, 0, 400 * SECOND_US, 0)[i],
            "properties": {"watch_ms": 10 + i} if i == 2 else None,
        }
        for i in range(5)
    ]
    taken_back = {**events[4], "event_id": f"{name}-r", "event_type": "retraction", "retracts": f"{name}-4", "properties": None}
    dead = {**events[0], "event_id": f"{name}-dead", "event_ts": now_us - DUPLICATE_MEMORY_US - 1}
    return [*events, events[0], taken_back, dead]


def open_home(folder: Path, clock: ManualClock) -> tuple[Lake, EventLog]:
    home = Home(folder)
    lake = Lake.open(home)
    create_tables(lake)
    return lake, EventLog.open(home.log, clock=clock, start=landed_position(lake))


def post(log: EventLog, folder: Path, name: str, clock: ManualClock) -> None:
    events = batch(name, clock)
    log.append(events)
    with open(folder / "acknowledged", "a") as file:
        file.write("".join(f"{one['event_id']}\n" for one in events))


def collector(folder: Path, name: str, now_us: int) -> None:
    clock = ManualClock(now_us)
    _, log = open_home(folder, clock)
    for number in range(ROUNDS):
        clock.advance_us(20 * SECOND_US)
        post(log, folder, f"{name}-{number}", clock)


def lander(folder: Path, name: str, now_us: int) -> None:
    clock = ManualClock(now_us)
    lake, log = open_home(folder, clock)
    Lander(lake, log, clock, LANDER).flush()


def runner(folder: Path, name: str, now_us: int) -> None:
    clock = ManualClock(now_us)
    lake, log = open_home(folder, clock)
    groups, store = load_groups(), Home(folder).online / STORE_FOLDER
    publisher = Publisher(store, groups)
    own = Runner(
        lake, log, open_store(store, lake, log, groups), groups, clock, RunnerSettings(lander=LANDER), publisher=publisher
    )
    own.catch_up()
    for number in range(ROUNDS):
        clock.advance_us(100 * SECOND_US)
        post(log, folder, f"{name}-{number}", clock)
        own.step()
        own.publish()


ROLES = {"collector": collector, "lander": lander, "runner": runner}


def run(role: str, folder: Path, name: str, now_us: int, crash_at: int) -> None:
    """One life of a victim; the number of boundaries that it passed is in the file `boundaries` if it lives to the end."""
    points = install(crash_at)
    ROLES[role](folder, name, now_us)
    (folder / "boundaries").write_text(str(points.num))
    os._exit(0)
