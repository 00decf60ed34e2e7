"""The embedded runner against a real lake and a real log: nothing lost, nothing twice, the same values from every start."""

import json

import numpy as np
import pytest

from streaming_sql.event_log import EventLog
from streaming_sql.lander import Lander, LanderSettings
from streaming_sql.online_store import OnlineStore
from streaming_sql.records import to_table
from streaming_sql.runner import Runner, RunnerSettings
from streaming_sql.runner_report import iso
from warehouse.clock import ManualClock
from warehouse.errors import HeadraceError
from warehouse.events import EVENTS_SCHEMA, partition_of
from warehouse.features.declarations import load_groups
from warehouse.features.render import block_sql, retracted_sql, retractions_sql, staging_sql
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import DEAD_LETTERS, EVENTS, create_tables, land_records, landed_position
from warehouse.time_algebra import DAY_US, DUPLICATE_MEMORY_US, FIVE_MINUTES_US, GRACE_US, HOUR_US, SECOND_US

START_US = 1_651_766_400_000_000  # 2022-05-05T16:00:00Z
GROUPS = load_groups()


class World:
    """One home: what a server process holds, to be opened again after a crash."""

    def __init__(self, home, clock):
        self.home, self.clock = home, clock

    def open(self, **settings):
        self.lake = Lake.open(self.home)
        create_tables(self.lake)
        self.log = EventLog.open(self.home.log, clock=self.clock, start=landed_position(self.lake))
        store = OnlineStore.from_lake(self.lake, GROUPS)
        lander = LanderSettings(**settings) if settings else LanderSettings(rows=50, age_us=60 * SECOND_US)
        self.runner = Runner(self.lake, self.log, store, GROUPS, self.clock, RunnerSettings(lander=lander))
        return self

    def crash(self):
        self.log.close()  # the files are as a kill leaves them: nothing is written on the way out

    def post(self, *events):
        return self.log.append([{"event_ts": self.clock.now_us(), "note_id": "n1", "author_id": "a1", **one} for one in events])

    def values(self, group, key, t_us=None):
        matrix = self.runner.store.view().assemble(group, [key], t_us or self.clock.now_us() + 1)
        return dict(zip(matrix.names, matrix.values[0].tolist(), strict=True)) | {k: v[0] for k, v in matrix.sequences.items()}


@pytest.fixture
def world(tmp_path):
    world = World(Home(tmp_path), ManualClock(START_US)).open()
    world.runner.catch_up()
    yield world
    world.crash()


def click(event_id, user_id="u1", **fields):
    return {"event_id": event_id, "event_type": "click", "user_id": user_id, **fields}


def test_a_click_counts_in_the_next_request_and_in_its_notes_block_at_the_next_tick(world):
    world.post(click("c1"))
    world.runner.step()
    assert world.values("user_activity", ("u1",))["user_num_clicks_5m"] == 1
    assert world.values("user_activity", ("u1",))["user_last_clicks_30d"] == ["n1"]
    assert world.values("note_engagement", ("n1",))["note_num_clicks_1h"] == 0
    world.clock.advance_us(FIVE_MINUTES_US + GRACE_US - 1)
    assert world.runner.step().closed_tick_us is None or world.runner.store.tick_us <= START_US
    world.clock.advance_us(5 * SECOND_US + 1)
    report = world.runner.step()
    assert report.closed_tick_us == START_US + FIVE_MINUTES_US
    assert world.values("note_engagement", ("n1",))["note_num_clicks_1h"] == 1
    assert world.values("user_activity", ("u1",))["user_num_clicks_1h"] == 1


def test_a_late_event_is_a_row_of_a_later_tick_and_counted_as_late(world):
    world.post(click("c1", event_ts=START_US - HOUR_US + 1))
    report = world.runner.step()
    assert (report.num_events, report.num_late) == (1, 1)
    world.clock.advance_us(FIVE_MINUTES_US + GRACE_US + 5 * SECOND_US)
    world.runner.step()
    note = world.values("note_engagement", ("n1",))
    assert (note["note_num_clicks_1h"], note["note_num_clicks_6h"]) == (0, 1)
    [block] = world.runner.store.view().explain("note_engagement", ("n1",), world.clock.now_us()).blocks
    assert (block["block_start"], block["known_at"]) == (START_US - HOUR_US, START_US)


def test_one_idle_partition_does_not_hold_the_tick(world):
    assert partition_of("u1") == 0  # so partition 1 is silent
    for _ in range(3):
        world.post(click(f"c{world.clock.now_us()}"))
        world.clock.advance_us(FIVE_MINUTES_US)
        world.runner.step()
    assert world.runner.store.tick_us >= START_US + FIVE_MINUTES_US


def test_dead_letters_are_buried_once_with_the_reason_and_count_nowhere(world):
    world.post(
        click("old", event_ts=START_US - DUPLICATE_MEMORY_US - 1), click("early", event_ts=START_US + HOUR_US), click("fine")
    )
    assert world.runner.step().num_dead == 2
    world.runner.flush()
    letters = world.lake.scan(DEAD_LETTERS).sort_by("reason").to_pylist()
    assert [letter["reason"].split(" ", 3)[2] for letter in letters] == ["older", "stamped"]
    assert json.loads(letters[0]["payload"])["event_id"] == "old"
    landed = world.lake.scan(EVENTS)["event_id"].to_pylist()
    assert "fine" in landed
    assert "old" not in landed
    assert world.values("user_activity", ("u1",))["user_num_clicks_7d"] == 1
    world.crash()
    world.open().runner.catch_up()
    world.runner.flush()
    assert world.lake.scan(DEAD_LETTERS).num_rows == 2


def test_records_land_by_size_then_by_age_and_the_log_lets_go_of_them(world):
    world.post(*(click(f"c{i}", user_id=f"u{i}") for i in range(49)))
    assert world.runner.step().num_landed == 0
    world.post(click("c49"), click("c50"))
    assert world.runner.step().num_landed == 50
    world.runner.flush()
    world.post(click("c51"))
    world.clock.advance_us(59 * SECOND_US)
    assert world.runner.step().num_landed == 0
    world.clock.advance_us(SECOND_US)
    assert world.runner.step().num_landed > 0
    events = world.lake.scan(EVENTS)
    clicks = [one for one in events["event_id"].to_pylist() if one.startswith("c")]
    assert sorted(clicks) == sorted(f"c{i}" for i in range(52))
    world.clock.advance_us(2 * DAY_US)
    world.runner.step()
    world.runner.flush()
    with pytest.raises(HeadraceError, match="read the lake first"):
        world.log.read((0, 0), 1)


def import_one(world, position):
    """What `headrace land` would do to the lake, one row at the first offset of partition 0."""
    row = {"event_id": "imported", "event_type": "view", "event_ts": START_US, "user_id": "u1", "landed_at": START_US}
    row |= {"log_partition": 0, "log_offset": position[0] - 1, "landing": "declared"}
    land_records(world.lake, to_table([tuple(row.get(name) for name in EVENTS_SCHEMA.names)]), position)


@pytest.mark.parametrize("position", [(1, 0), (9, 9)])
def test_an_import_that_took_the_logs_offsets_is_found_out_and_nothing_is_lost(world, position):
    world.post(click("c1"), click("c2"))
    world.runner.step()
    import_one(world, position)
    with pytest.raises(HeadraceError, match="nothing is lost: start again"):
        world.runner.flush()
    world.crash()
    world.open().runner.catch_up()
    world.post(click("c3"), click("c1"))
    world.runner.step()
    assert world.values("user_activity", ("u1",))["user_num_clicks_1d"] == 3
    world.runner.flush()
    rows = world.lake.scan(EVENTS).to_pylist()
    assert sorted(row["event_id"] for row in rows if row["event_type"] != "heartbeat") == ["c1", "c2", "c3", "imported"]
    assert len({(row["log_partition"], row["log_offset"]) for row in rows}) == len(rows)


def test_two_landers_share_the_work_and_land_nothing_twice(world):
    other = Lander(world.lake, world.log, world.clock)
    for i in range(4):
        world.post(click(f"c{i}"))
        assert (world.runner if i % 2 else other).flush() > 0
    landed = world.lake.scan(EVENTS)["event_id"].to_pylist()
    assert sorted(one for one in landed if one.startswith("c")) == ["c0", "c1", "c2", "c3"]


def traffic(world, rng, rounds):
    """Clicks and watches of a few users; some late, some repeated, some retracted after or before, some in quiet spells."""
    posted = []
    for _ in range(rounds):
        world.clock.advance_us(int(rng.choice([1_000_000, 40_000_000, 200_000_000])))
        number, events = world.clock.now_us(), []
        for i in range(int(rng.integers(0, 6))):
            kind = ["view", "click", "watch"][rng.integers(3)]
            event = {"event_id": f"{number}-{i}", "event_type": kind, "user_id": f"u{rng.integers(5)}"}
            event |= {"note_id": f"n{rng.integers(4)}", "author_id": f"a{rng.integers(2)}"}
            event["event_ts"] = world.clock.now_us() - int(rng.choice([0, 1_000_000, 400_000_000, 30_000_000_000]))
            if kind == "watch":
                event["properties"] = {"watch_ms": int(rng.integers(0, 1000))}
            events.append(event)
            posted.append(event["event_id"])
            if rng.random() < 0.2:
                target = posted[rng.integers(len(posted))] if rng.random() < 0.8 else f"{number}-{i + 1}"
                events.append({**event, "event_id": f"r{number}-{i}", "event_type": "retraction", "retracts": target})
        if events and rng.random() < 0.3:
            events.append({**events[0], "note_id": "n9"})
        world.post(*events)
        world.runner.step()


def everything(world):
    """All values of all keys, at one t."""
    view, t_us = world.runner.store.view(), world.clock.now_us() + 1
    keys = {
        "note_engagement": [(f"n{i}",) for i in range(10)],
        "author_engagement": [(f"a{i}",) for i in range(3)],
        "user_activity": [(f"u{i}",) for i in range(6)],
        "user_author_affinity": [(f"u{i}", f"a{j}") for i in range(6) for j in range(3)],
    }
    matrices = [view.assemble(name, keys[name], t_us) for name in GROUPS]
    return view.tick_us, np.concatenate([m.values.ravel() for m in matrices]), [m.sequences for m in matrices]


def assert_same(one, other):
    assert one[0] == other[0]
    np.testing.assert_array_equal(one[1], other[1])
    assert one[2] == other[2]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_crash_between_any_two_rounds_changes_nothing(world, seed):
    rng = np.random.default_rng(seed)
    for _ in range(3):
        traffic(world, rng, 8)
        before = everything(world)
        assert np.nansum(before[1]) > 0
        world.crash()
        world.open().runner.catch_up()
        assert_same(before, everything(world))
    ids = [one for one in world.lake.scan(EVENTS)["event_id"].to_pylist() if not one.startswith("heartbeat")]
    assert len(ids) == len(set(ids))


def build_blocks(lake, through_us):
    """What dbt does: blocks of every tick up to `through_us` from the lake's events, and the property that says so."""
    with lake.duckdb() as connection:
        connection.execute(f"create view staged as {staging_sql('lake.events')}")
        connection.execute(f"create view retractions as {retractions_sql('lake.events')}")
        connection.execute(f"create view retracted as {retracted_sql('staged', 'retractions')}")
        for name, group in GROUPS.items():
            sql = f"select * from ({block_sql(group, 'staged', 'retracted')}) where known_at <= make_timestamptz({through_us})"
            rows = connection.execute(sql).to_arrow_table()
            lake.create(f"features.{name}", rows.schema)
            lake.append(f"features.{name}", rows)
            with lake.transaction(f"features.{name}") as transaction:
                transaction.set_properties({"headrace.built_until": iso(through_us + FIVE_MINUTES_US)})


def retraction(event_id, retracts, **fields):
    return {"event_id": event_id, "event_type": "retraction", "retracts": retracts, "user_id": "u1", **fields}


def test_a_retraction_is_seen_by_fresh_features_at_once_and_by_the_others_at_its_tick(world):
    world.post(click("c1", note_id="n1"), click("c2", note_id="n2"))
    world.runner.step()
    world.post(retraction("r1", "c2"))
    world.runner.step()
    fresh = world.values("user_activity", ("u1",))
    assert (fresh["user_num_clicks_1h"], fresh["user_last_clicks_30d"]) == (1, ["n1"])  # out of the head
    world.clock.advance_us(3 * FIVE_MINUTES_US)
    world.runner.step()
    assert world.values("note_engagement", ("n2",))["note_num_clicks_1h"] == 0  # and never in a block
    assert world.values("note_engagement", ("n1",))["note_num_clicks_1h"] == 1
    world.runner.flush()  # c1 is in the lake and in the blocks by now
    world.post(retraction("r2", "c1"))
    world.runner.step()
    view = world.runner.store.view()
    fresh = world.values("user_activity", ("u1",))
    assert (fresh["user_num_clicks_1h"], fresh["user_last_clicks_30d"]) == (0, [])
    assert world.values("note_engagement", ("n1",))["note_num_clicks_1h"] == 1
    world.clock.advance_us(2 * FIVE_MINUTES_US)
    world.runner.step()
    assert world.values("note_engagement", ("n1",))["note_num_clicks_1h"] == 0
    assert world.values("user_activity", ("u1",))["user_num_clicks_1h"] == 0
    assert world.runner.totals.num_retractions == 2
    before = view.assemble("user_activity", [("u1",)], world.clock.now_us())
    assert before.sequences["user_last_clicks_30d"] == [[]]  # a view is a snapshot


def test_a_retraction_comes_before_its_target_twice_or_for_nothing_and_changes_what_it_should(world):
    world.post(retraction("r1", "c1"), retraction("r2", "c1"), retraction("r3", "never"), retraction("r4", "r3"))
    world.runner.step()
    world.post(click("c1"), click("c2"))
    world.runner.step()
    assert world.values("user_activity", ("u1",))["user_num_clicks_1h"] == 1
    world.clock.advance_us(3 * FIVE_MINUTES_US)
    world.runner.step()
    assert world.values("note_engagement", ("n1",))["note_num_clicks_1h"] == 1
    world.post(retraction("r5", "c1"))
    world.clock.advance_us(3 * FIVE_MINUTES_US)
    world.runner.step()
    assert world.values("note_engagement", ("n1",))["note_num_clicks_1h"] == 1


def test_the_click_before_comes_back_into_a_full_list(world):
    world.post(*(click(f"c{i}", note_id=f"n{i}", event_ts=START_US + i) for i in range(52)))
    world.clock.advance_us(3 * FIVE_MINUTES_US)
    world.runner.step()
    world.clock.advance_us(3 * FIVE_MINUTES_US)
    world.post(click("c52", note_id="n52"))
    world.runner.step()
    world.clock.advance_us(3 * FIVE_MINUTES_US)
    world.runner.step()
    assert world.values("user_activity", ("u1",))["user_last_clicks_30d"] == [f"n{i}" for i in range(3, 53)]
    world.post(retraction("r1", "c52"), retraction("r2", "c10"))
    world.runner.step()
    expected = [f"n{i}" for i in range(1, 52) if i != 10]
    assert world.values("user_activity", ("u1",))["user_last_clicks_30d"] == expected
    world.clock.advance_us(3 * FIVE_MINUTES_US)
    world.runner.step()
    assert world.values("user_activity", ("u1",))["user_last_clicks_30d"] == expected


def test_bulk_loaded_blocks_and_a_replay_of_everything_give_the_same_values(world):
    rng = np.random.default_rng(3)
    traffic(world, rng, 40)
    before = everything(world)
    world.runner.flush()
    build_blocks(world.lake, world.runner.store.tick_us - 3 * FIVE_MINUTES_US)
    world.crash()
    world.open()
    assert world.runner.store.tick_us == before[0] - 3 * FIVE_MINUTES_US
    told = []
    world.runner.catch_up(lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]
    assert_same(before, everything(world))
    traffic(world, rng, 20)
    again = everything(world)
    world.crash()
    world.open().runner.catch_up()
    assert_same(again, everything(world))


def test_blocks_built_past_the_closed_tick_are_not_believed(world):
    world.post(click("c1"))
    world.clock.advance_us(FIVE_MINUTES_US + 40 * SECOND_US)
    world.runner.step()
    tick_us = world.runner.store.tick_us
    world.runner.flush()
    build_blocks(world.lake, tick_us + 12 * FIVE_MINUTES_US)
    world.crash()
    world.open()
    assert world.runner.store.tick_us == tick_us
    world.runner.catch_up()
    world.post(click("c2"))
    world.runner.step()
    assert world.values("user_activity", ("u1",))["user_num_clicks_1d"] == 2


def test_the_threads_keep_up_with_the_wall_clock_and_stop_cleanly(tmp_path):
    from warehouse.clock import Clock

    world = World(Home(tmp_path), Clock()).open(rows=10, age_us=10 * SECOND_US)
    world.runner.catch_up()
    with pytest.raises(HeadraceError, match="no feature group"):
        world.runner.store.view().assemble("nothing", [], world.clock.now_us())
    world.runner.start()
    for i in range(30):
        positions = world.post(click(f"c{i}"))
        partition, offset = positions[0]
        assert world.runner.wait_until(tuple(offset + 1 if p == partition else 0 for p in (0, 1)))
        assert world.values("user_activity", ("u1",))["user_num_clicks_1d"] == i + 1
    world.runner.stop()
    assert world.runner.is_healthy
    landed = world.lake.scan(EVENTS)
    assert landed.schema.names == EVENTS_SCHEMA.names
    assert sorted(one for one in landed["event_id"].to_pylist() if one.startswith("c")) == sorted(f"c{i}" for i in range(30))
    world.crash()


def test_a_runner_that_looks_seldom_looks_at_once_for_whoever_waits(tmp_path):
    from warehouse.clock import Clock

    world = World(Home(tmp_path), Clock()).open()
    seldom = RunnerSettings(poll_seconds=600.0, idle_poll_seconds=600.0)
    runner = Runner(world.lake, world.log, world.runner.store, GROUPS, world.clock, seldom, only_reads=True)
    runner.catch_up()
    runner.start()
    for i in range(3):
        [(partition, offset)] = world.post(click(f"c{i}"))
        assert runner.wait_until(tuple(offset + 1 if p == partition else 0 for p in (0, 1)), timeout_s=60.0)
    runner.stop()
    world.crash()


def test_heartbeats_are_no_sign_that_events_come(tmp_path):
    world = World(Home(tmp_path), ManualClock(START_US)).open()
    world.runner.catch_up()
    assert world.log.heartbeat(0) > 0
    before = sum(world.runner.store.position)
    assert world.runner._feed_events() == 0
    assert sum(world.runner.store.position) > before  # they were read
    world.post(click("c1"))
    assert world.runner._feed_events() == 1
    world.crash()


def test_a_runner_that_has_not_caught_up_refuses_to_run(tmp_path):
    world = World(Home(tmp_path), ManualClock(START_US)).open()
    with pytest.raises(HeadraceError, match="call catch_up"):
        world.runner.step()
    with pytest.raises(HeadraceError, match="call catch_up"):
        world.runner.start()
    world.crash()
