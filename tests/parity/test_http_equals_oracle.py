"""The live store fed through HTTP: events are posted to a server that is killed on the way, again and again. What it answered
for counts once, and the store that the next start makes equals the oracle over what is in the lake."""

import contextlib
import os
import signal
import threading
import time

import httpx
import pytest

from streaming_sql.event_log import EventLog
from streaming_sql.published_ticks import PublishedTicks
from streaming_sql.restore import STORE_FOLDER, open_store
from streaming_sql.runner import Runner
from tests import forked
from tests.serving.hand_made import free_port, furnish
from tests.streaming_sql.generated import AUTHORS, NOTES, USERS, typed
from tests.streaming_sql.test_live_store import assert_equals_oracle
from warehouse.clock import ManualClock
from warehouse.events import EVENTS_SCHEMA
from warehouse.features.declarations import load_groups
from warehouse.home import REPOSITORY, Home
from warehouse.lake import Lake
from warehouse.landing import EVENTS, landed_position
from warehouse.time_algebra import DAY_US, FIVE_MINUTES_US, MINUTE_US, SECOND_US

GROUPS = load_groups()
LIVES, POSTS = 3, 8
FIRST_US = 1_650_934_800_000_000  # 2022-04-26T01:00:00Z, an hour after the history ends
SERVE = "import sys; from headrace.cli import main; sys.exit(main(['serve', *sys.argv[1:]]))"
TYPES = ("view", "click", "watch", "like", "click", "retraction")

forked.import_ahead("torch", "numba", "pandas", "fastapi", "uvicorn", "psycopg", "usearch")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("home"))
    furnish(home, num_users=180, num_notes=120, days=1)
    return home


def events_of(life, number, now_us):
    """Ten events of a post: some late, two that repeat what an earlier post sent, one that takes an earlier one back."""
    events = []
    for i in range(8):
        name = f"{life}-{number}-{i}"
        kind = TYPES[(number + i) % len(TYPES)]
        event = {"eventId": name, "eventType": kind, "userId": USERS[i % 2]}
        if kind == "retraction":
            event |= {"retracts": f"{life}-{number - 1}-{i - 1 if i else 7}"}
        else:
            late_s = (0, 1, 400, 4000)[i % 4]
            event_us = now_us - late_s * SECOND_US
            event |= {"noteId": NOTES[number % 2], "authorId": AUTHORS[i % 2], "eventTs": iso(event_us)}
            event |= {"watchMs": 100 + i} if kind == "watch" else {}
        events.append(event)
    return [*events, events[0], *([{**events[1], "eventId": f"{life}-{number - 1}-2"}] if number else [])]


def iso(instant_us):
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(instant_us // SECOND_US)) + "Z"


@contextlib.contextmanager
def serving(home, started_us):
    """(client, process) of a server whose clock starts there and runs sixty times as fast."""
    environment = {
        **os.environ,
        "HEADRACE_HOME": str(home.path),
        "HEADRACE_CLOCK": f"{iso(started_us)}@60",
        "OMP_NUM_THREADS": "1",
    }
    port, said = free_port(), home.path / "server.log"
    said.touch()
    process = forked.started(
        SERVE, "--port", str(port), cwd=REPOSITORY, environment=environment, printed=(str(said), str(said))
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            until_ready(client, process, said)
            yield client, process
    finally:
        process.kill()
        process.join()


def until_ready(client, process, said):
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/readyz").status_code == 200:
                return
        assert process.is_alive(), said.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def one_life(home, life, started_us):
    """Posts until the server is gone; returns the ids that it acknowledged."""
    acknowledged = set()
    with serving(home, started_us) as (client, process):
        killer = threading.Timer(0.004 * life, process.kill)
        began = time.monotonic()
        try:
            for number in range(10_000):
                if number == POSTS + life:
                    killer.start()  # while this post is on its way, or is answered
                now_us = started_us + round((time.monotonic() - began) * 60 * SECOND_US)
                events = events_of(life, number, now_us)
                answer = client.post("/v1/events", json={"events": events})
                for event, result in zip(events, answer.json()["results"], strict=True):
                    if result["status"] == "accepted":
                        acknowledged.add(event["eventId"])
        except httpx.TransportError:
            process.join(60)
            assert process.exitcode == -signal.SIGKILL
        finally:
            killer.cancel()
    return acknowledged


def landed_rows(lake):
    """Every record of the lake, times in microseconds."""
    rows = lake.scan(EVENTS)
    instants = {name: rows[name].cast("int64").to_pylist() for name in ("event_ts", "landed_at")}
    return [
        row | {name: values[i] for name, values in instants.items()}
        for i, row in enumerate(rows.select(EVENTS_SCHEMA.names).to_pylist())
    ]


@pytest.mark.timeout(600)
def test_a_server_that_is_killed_again_and_again_counts_what_it_acknowledged_once(home):
    acknowledged, now_us = set(), FIRST_US
    for life in range(LIVES):
        acknowledged |= one_life(home, life, now_us)
        now_us += 40 * MINUTE_US  # a replay clock starts over with its process: later than where the last life can have ended
    assert len(acknowledged) > 100
    clock, lake = ManualClock(now_us), Lake.open(home)
    log = EventLog.open(home.log, clock=clock, start=landed_position(lake))
    store = open_store(home.online / STORE_FOLDER, lake, log, GROUPS)
    runner = Runner(lake, log, store, GROUPS, clock)
    runner.catch_up()
    runner.step()
    clock.advance_us(FIVE_MINUTES_US + MINUTE_US)
    log.heartbeat()
    runner.step()
    runner.flush()
    arrivals = landed_rows(lake)
    ids = [row["event_id"] for row in arrivals if row["landing"] == "log" and row["event_type"] != "heartbeat"]
    assert len(ids) == len(set(ids))
    assert acknowledged <= set(ids)
    view = runner.store.view()
    assert view.tick_us > FIRST_US + LIVES * 30 * MINUTE_US
    assert_equals_oracle(view, [typed(row) for row in arrivals], clock.now_us() + 1, GROUPS)
    log.close()


MIDNIGHT_US = 1_651_017_600_000_000  # 2022-04-27T00:00:00Z


@pytest.mark.timeout(900)
def test_ticks_of_the_hour_and_the_day_pass_while_events_are_posted_and_feeds_are_asked(home):
    """What another process read of each tick on the way equals the oracle over what has landed in the end."""
    for day, minutes in enumerate((20, 90, 240)):  # as many seconds to start in: a slow machine has another night
        midnight_us = MIDNIGHT_US + day * DAY_US
        held, acknowledged = one_night(home, midnight_us - minutes * MINUTE_US, midnight_us)
        if held:
            break
    assert max(held) > midnight_us
    arrivals = landed_rows(Lake.open(home))
    assert acknowledged <= {row["event_id"] for row in arrivals}
    assert len(acknowledged) > 30
    events = [typed(row) for row in arrivals]
    for tick_us in sorted(held)[-3:]:  # a slow machine closes several at once
        assert_equals_oracle(held[tick_us], events, tick_us + MINUTE_US, GROUPS)


def following(home, folder):
    """(a runner of this process that follows the server's, the ticks that it takes)."""
    lake, ticks = Lake.open(home), PublishedTicks(folder, GROUPS)
    log = EventLog.open(home.log)
    store = ticks.open_store(lake, log)
    runner = Runner(lake, log, store, GROUPS, ManualClock(FIRST_US), only_reads=True, elsewhere=ticks)
    runner.catch_up()
    return runner, ticks


def one_night(home, started_us, midnight_us):
    """(views by tick, acknowledged ids) of a server whose clock passes midnight; nothing if it had not started by then."""
    folder, held, acknowledged = home.online / STORE_FOLDER, {}, set()
    began = time.monotonic()
    with serving(home, started_us) as (client, process):
        follower = None
        for number in range(2_000):
            now_us = started_us + round((time.monotonic() - began) * 60 * SECOND_US)
            if now_us > midnight_us and number == 0:
                return {}, set()
            events = events_of(f"night{started_us}", number, now_us)
            results = client.post("/v1/events", json={"events": events}).json()["results"]
            for event, result in zip(events, results, strict=True):
                if result["status"] == "accepted":
                    acknowledged.add(event["eventId"])
            assert client.post("/v1/feed", json={"userId": USERS[number % 2]}).status_code == 200
            if follower is None and any(folder.glob("tick-*.json")):
                follower, ticks = following(home, folder)
            if follower is not None:
                ticks.look()
                follower._feed_once(10_000)
                held[follower.store.tick_us] = follower.store.view()
            if held and max(held) > midnight_us:
                break
            time.sleep(0.1)
        process.terminate()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGTERM)
    return held, acknowledged
