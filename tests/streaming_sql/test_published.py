"""What a store publishes at each tick answers like the store itself: in a process that follows, and in its own next start."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_sql.array_file import map_arrays, text_arrays, texts_of, write_arrays
from streaming_sql.feed import Feed
from streaming_sql.key_index import KeyIndex, KeysBeside
from streaming_sql.online_store import OnlineStore
from streaming_sql.published import Publisher
from streaming_sql.published_ticks import PublishedTicks
from streaming_sql.restore import STORE_FOLDER, open_store
from streaming_sql.runner import Runner, RunnerSettings
from streaming_sql.short_head import SHORT, troubles_of, words_of
from streaming_sql.text_codes import CodesBeside, TextCodes
from tests.streaming_sql.generated import GROUPS, as_table
from tests.streaming_sql.test_live_store import assert_equals_oracle, begun, deliveries, times_to_ask
from tests.streaming_sql.test_runner import GROUPS as PROJECT_GROUPS
from tests.streaming_sql.test_runner import START_US, World, build_blocks
from warehouse.clock import ManualClock
from warehouse.errors import HeadraceError
from warehouse.home import Home
from warehouse.time_algebra import FIVE_MINUTES_US, MINUTE_US


@settings(max_examples=10)
@given(deliveries(), st.data())
def test_a_store_that_follows_answers_as_the_oracle_does_at_each_tick_and_between(tmp_path_factory, delivery, data):
    """Ahead of the leader or behind it, though leaders end and others with other numbers begin, and files get lost."""
    some = data.draw(st.lists(st.sampled_from(list(GROUPS)), min_size=1, max_size=3, unique=True))
    groups = {name: GROUPS[name] for name in some}
    events, pieces, led, history, leading = begun(delivery, groups)
    folder = tmp_path_factory.mktemp("store")
    publisher, ticks, position = Publisher(folder, groups), PublishedTicks(folder, groups), led.position
    store = OnlineStore(groups, position=position)
    following = Feed(store, groups, position, history, elsewhere=ticks)
    seen, held, num_led, published, view = [], [], 0, set(), store.view()
    for number, piece in enumerate(pieces, 1):
        history.records += piece
        seen += piece
        match data.draw(st.sampled_from(["leads", "leads", "away", "another"])):
            case "another":
                led = OnlineStore(groups, position=position)
                leading, publisher, num_led = Feed(led, groups, position, history), Publisher(folder, groups), number
                leading.take(as_table(seen))
            case "leads":
                leading.take(as_table([record for one in pieces[num_led:number] for record in one]))
                num_led = number
        if led.tick_us > 0 and led.tick_us != publisher.tick_us:
            publisher.publish(led.view(), {})
            published.add(led.tick_us)
        ticks.look()
        following.take(as_table(piece))
        before, view = view, store.view()
        assert view.position == following.position
        assert view.tick_us in {0, *published}
        if view.tick_us == before.tick_us and data.draw(st.booleans()):
            continue
        t_us = data.draw(st.sampled_from(times_to_ask(data.draw, view, events, seen)))
        assert_equals_oracle(view, events, t_us, groups)
        held.append((view, t_us))
    assert store.tick_us == max((tick_us for tick_us in published), default=0)
    assert all(work.num_blocks_added == 0 for work in store.work.values())
    for view, t_us in data.draw(st.lists(st.sampled_from(held), max_size=2)) if held else ():
        assert_equals_oracle(view, events, t_us, groups)  # also when the files of its tick were swept away


def moved(world, num_ticks, name="u"):
    """Clicks of many users in each of some ticks; the runner reads every one."""
    for tick in range(num_ticks):
        world.post(*({"event_id": f"{name}{tick}-{i}", "event_type": "click", "user_id": f"{name}{i}"} for i in range(20)))
        world.runner.step()
        world.clock.advance_us(FIVE_MINUTES_US)
    world.clock.advance_us(MINUTE_US)
    world.log.heartbeat()
    world.runner.step()


def opened(tmp_path):
    world = World(Home(tmp_path), ManualClock(START_US)).open()
    publisher = Publisher(world.home.online / STORE_FOLDER, PROJECT_GROUPS)
    return publishing(world, world.runner.store, publisher), publisher


def publishing(world, store, publisher):
    world.runner = Runner(world.lake, world.log, store, PROJECT_GROUPS, world.clock, RunnerSettings(), publisher=publisher)
    world.runner.catch_up()
    return world


def restarted(world):
    """Opened again as a start after a kill does."""
    world.crash()
    world.open()
    folder = world.home.online / STORE_FOLDER
    store = open_store(folder, world.lake, world.log, PROJECT_GROUPS)
    return publishing(world, store, Publisher(folder, PROJECT_GROUPS)), store


def everything(world):
    users = [(f"u{i}",) for i in range(20)] + [("nobody",)]
    return world.runner.store.view().assemble("user_activity", users, world.clock.now_us() + 1)


def following(world, max_head_events=None):
    """(the runner of another process on the world's home, the ticks that it takes)."""
    ticks = PublishedTicks(world.home.online / STORE_FOLDER, PROJECT_GROUPS)
    store = ticks.open_store(world.lake, world.log)
    runner = Runner(
        world.lake,
        world.log,
        store,
        PROJECT_GROUPS,
        world.clock,
        RunnerSettings(),
        only_reads=True,
        elsewhere=ticks,
        max_head_events=max_head_events,
    )
    runner.catch_up()
    return runner, ticks


def clicks_of(runner, clock):
    """What both kinds of windows, the tick's and the event's, say of some users."""
    users = [(f"u{i}",) for i in range(20)] + [("nobody",)]
    found = runner.store.view().assemble("user_activity", users, clock.now_us() + 1)
    return runner.store.tick_us, runner.store.position, np.nan_to_num(found.values, nan=-1.0).tolist(), found.sequences


def test_without_a_leader_the_head_of_one_that_follows_keeps_the_newest_events_it_has_room_for(tmp_path):
    world, _ = opened(tmp_path)
    moved(world, 14)
    world.runner.publish()
    runner, ticks = following(world, max_head_events=60)
    assert words_of(runner.store.view()) == troubles_of(runner.store.view()) == []
    for number in range(100):
        world.post({"event_id": f"alone{number}", "event_type": "click", "user_id": f"u{number % 20}"})
        world.clock.advance_us(MINUTE_US // 10)
        runner._feed_once(1000)
        assert runner.store.num_head_events() <= 60
    view = runner.store.view()
    assert words_of(view) == [SHORT]
    assert "the oldest events since were dropped (features_head_events)" in troubles_of(view)[0]
    of_the_newest = view.groups["user_activity"].head.visible(("u19",), view.position, world.clock.now_us() + 1)
    assert of_the_newest
    world.clock.advance_us(FIVE_MINUTES_US)
    world.log.heartbeat()
    world.runner.step()
    assert world.runner.publish()
    ticks.look()
    runner._feed_once(1000)
    assert words_of(runner.store.view()) == []
    assert clicks_of(runner, world.clock) == clicks_of(world.runner, world.clock)


def test_a_process_that_follows_maps_what_a_tick_changed_and_counts_the_events_after_it(tmp_path):
    world, publisher = opened(tmp_path)
    moved(world, 14)
    world.runner.publish()
    first = publisher.num_bytes_written
    world.post({"event_id": "before", "event_type": "click", "user_id": "u3"})
    world.runner.step()
    runner, ticks = following(world)
    assert clicks_of(runner, world.clock) == clicks_of(world.runner, world.clock)
    bulk = runner.store.view().groups["user_activity"].layers[0]
    world.clock.advance_us(FIVE_MINUTES_US + MINUTE_US)
    world.log.heartbeat()
    world.runner.step()
    world.post({"event_id": "after", "event_type": "click", "user_id": "u4"})
    world.runner.step()
    runner._feed_once(1000)
    behind, tick_us = runner.store.view(), world.runner.store.tick_us
    assert (behind.tick_us < tick_us, behind.position) == (True, world.runner.store.position)
    assert runner.store.num_head_events() > world.runner.store.num_head_events()
    assert world.runner.publish()
    assert publisher.num_bytes_written - first < first / 2
    ticks.look()
    runner._feed_once(1000)  # nothing has come since
    assert clicks_of(runner, world.clock) == clicks_of(world.runner, world.clock)
    assert runner.store.view().groups["user_activity"].layers[0] is bulk
    assert runner.store.num_head_events() == world.runner.store.num_head_events()
    world.crash()


def test_a_tick_that_is_damaged_is_left_out_until_a_leader_publishes_it_anew(tmp_path, caplog):
    world, publisher = opened(tmp_path)
    moved(world, 2)
    world.runner.publish()
    runner, ticks = following(world)
    folder = world.home.online / STORE_FOLDER
    for harm in ("layer", "keys", "gone", "manifest", "declarations"):
        caplog.clear()
        held, before = runner.store.tick_us, set(folder.iterdir())
        moved(world, 1, harm)
        publisher.publish(world.runner.store.view(), {})
        manifest = folder / f"tick-{world.runner.store.tick_us:020d}.json"
        match harm:
            case "manifest":
                manifest.write_text("{")
            case "declarations":
                manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"meaning": "others"}))
            case _:
                kind = "keys-" if harm == "keys" else "layer-"
                new = next(path for path in folder.iterdir() if path not in before and path.name.startswith(kind))
                new.unlink() if harm == "gone" else new.write_bytes(new.read_bytes()[:-9])
        for _ in range(3):
            ticks.look()
            runner._feed_once(100_000)
        assert (runner.store.tick_us, runner.store.position) == (held, world.runner.store.position)
        assert len(caplog.records) == len(ticks.troubles()) == (harm in ("layer", "keys", "declarations"))
        publisher = Publisher(folder, PROJECT_GROUPS)  # as whoever leads next
        publisher.publish(world.runner.store.view(), {})
        ticks.look()
        runner._feed_once(1)
        assert clicks_of(runner, world.clock) == clicks_of(world.runner, world.clock)
        assert ticks.troubles() == []
    world.crash()


def test_what_is_numbered_beside_a_table_keeps_its_number_whatever_the_table_brings():
    index, codes = KeyIndex(("user_id", "author_id")), TextCodes()
    index.extend([("a", "1"), ("b", "1")], [0, 1])
    codes.extend(["x", "y"], [1, 0])
    keys, texts = KeysBeside(index), CodesBeside(codes)
    new = pa.table({"user_id": ["a", "a", "c"], "author_id": ["1", "2", "3"]})
    rows, numbers = keys.add(new), texts.add(pa.array(["y", "z", "x", "z"]))
    assert (rows[0], numbers[0], numbers[2], numbers[1] == numbers[3]) == (0, 0, 1, True)
    index.extend([("d", "4"), ("a", "2")], [2, 3])
    codes.extend(["w", "z"], [2, 3])
    assert keys.find([("d", "4"), ("a", "2"), ("c", "3"), ("e", "5")]).tolist() == [2, *rows[1:].tolist(), -1]
    assert keys.add(new).tolist() == rows.tolist()
    assert keys.under("a") == [(("a", "1"), 0), (("a", "2"), rows[1])]
    assert (texts.code("z"), texts.code("w")) == (numbers[1], 2)
    assert texts.texts([*numbers, 2, 3]) == ["y", "z", "x", "z", "w", "z"]
    assert (len(keys), len(texts)) == (6, 5)


def test_a_start_takes_up_what_was_published_though_nothing_of_it_had_landed(tmp_path):
    world, _ = opened(tmp_path)
    moved(world, 6)
    world.runner.publish()
    world.post({"event_id": "after", "event_type": "click", "user_id": "u5"})
    world.runner.step()
    before, tick_us = everything(world), world.runner.store.tick_us
    world, store = restarted(world)
    assert sum(store.blocks_through) > 0
    assert world.runner.store.tick_us == tick_us
    assert np.array_equal(everything(world).values, before.values, equal_nan=True)
    assert everything(world).sequences == before.sequences
    world.crash()


@pytest.mark.parametrize("harm", ["cut", "flip", "manifest", "declarations", "version", "import", "log"])
def test_what_is_damaged_or_of_another_world_is_made_again_from_lake_and_log(tmp_path, harm, caplog):
    world, _ = opened(tmp_path)
    moved(world, 6)
    manifest = world.home.online / STORE_FOLDER / f"tick-{world.runner.store.tick_us:020d}.json"
    world.runner.publish()
    before = everything(world)
    layer = max(manifest.parent.glob("layer-*.bin"), key=lambda path: path.stat().st_size)
    told = json.loads(manifest.read_text())
    match harm:
        case "cut":
            layer.write_bytes(layer.read_bytes()[:-100])
        case "flip":
            data = bytearray(layer.read_bytes())
            data[-9] ^= 1
            layer.write_bytes(data)
        case "manifest":
            manifest.write_text("{")
        case "declarations":
            manifest.write_text(json.dumps(told | {"meaning": "others"}))
        case "version":
            groups = {name: {"layers": layers} for name, layers in told["groups"].items()}
            manifest.write_text(json.dumps(told | {"meaning": "others", "groups": groups}))
        case "import":
            manifest.write_text(json.dumps(told | {"origin": {"table": "other", "imports": []}}))
        case "log":
            manifest.write_text(json.dumps(told | {"position": [10**9, 0]}))
    world, store = restarted(world)
    assert store.blocks_through == (0, 0)
    assert bool(caplog.records) == (harm != "manifest")
    assert np.array_equal(everything(world).values, before.values, equal_nan=True)
    moved(world, 6)
    assert world.runner.publish()
    world.crash()


def test_a_process_with_other_declarations_is_told_so_and_one_without_a_tick_begins_with_the_lake(tmp_path):
    world, _ = opened(tmp_path)
    runner, _ = following(world)
    assert runner.store.tick_us == 0
    moved(world, 2)
    world.runner.publish()
    folder = world.home.online / STORE_FOLDER
    other = PublishedTicks(folder, {"user_activity": PROJECT_GROUPS["user_activity"]})
    with pytest.raises(HeadraceError, match="published for other feature declarations: stop the server"):
        other.open_store(world.lake, world.log)
    world.crash()


def test_a_tick_that_a_process_cannot_begin_with_is_not_taken_later_either(tmp_path):
    """Nor, once it is whole again, where it is no newer than the lake's."""
    world, _ = opened(tmp_path)
    moved(world, 3)
    world.runner.publish()
    tick_us = world.runner.store.tick_us
    manifest = world.home.online / STORE_FOLDER / f"tick-{tick_us:020d}.json"
    told = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(told) | {"origin": {"table": "other", "imports": []}}))
    world.runner.flush()
    without_blocks, older = following(world)
    build_blocks(world.lake, tick_us)
    with_blocks, same = following(world)
    moved(world, 1, "later")
    for runner, ticks, begun_us in ((without_blocks, older, 0), (with_blocks, same, tick_us)):
        ticks.look()
        runner._feed_once(100_000)
        assert runner.store.tick_us == begun_us
        assert "made from other events than the lake holds" in ticks.troubles()[0]
    manifest.write_text(told)
    for runner, ticks in ((without_blocks, older), (with_blocks, same)):
        ticks.look()
        runner._feed_once(1)
        assert runner.store.tick_us == tick_us
    world.runner.publish()
    for runner, ticks in ((without_blocks, older), (with_blocks, same)):
        ticks.look()
        runner._feed_once(1)
        assert clicks_of(runner, world.clock) == clicks_of(world.runner, world.clock)
        assert ticks.troubles() == []
    world.crash()


def test_arrays_of_any_shape_and_texts_come_back_as_they_were(tmp_path):
    texts = pa.array(["", "é", "n1", "x" * 100, "last"]).slice(1, 3)
    given = {"a": np.arange(6).reshape(2, 3), "none": np.zeros((0, 4)), "one": np.array([1.5], np.float32)}
    write_arrays(tmp_path / "a.bin", given | text_arrays("t", texts) | text_arrays("nothing", pa.array([], pa.string())))
    found = map_arrays(tmp_path / "a.bin")
    assert all(np.array_equal(found[name], array) and found[name].dtype == array.dtype for name, array in given.items())
    assert texts_of("t", found).to_pylist() == ["é", "n1", "x" * 100]
    assert texts_of("nothing", found).to_pylist() == []
    (tmp_path / "b.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="not a file of arrays"):
        map_arrays(tmp_path / "b.bin")


def test_only_the_keys_of_a_tick_are_touched_and_the_counters_say_so(tmp_path):
    world, _ = opened(tmp_path)
    moved(world, 30)
    before = {name: replace(work) for name, work in world.runner.store.work.items()}
    layers = {name: state.layers for name, state in world.runner.store.view().groups.items()}
    world.post({"event_id": "one", "event_type": "click", "user_id": "u3"})
    world.clock.advance_us(FIVE_MINUTES_US + MINUTE_US)
    world.log.heartbeat()
    world.runner.step()
    for name, work in world.runner.store.work.items():
        assert work.num_keys_touched - before[name].num_keys_touched == 1
        assert work.num_blocks_added - before[name].num_blocks_added == 1
        bulk = layers[name][0]
        if bulk.num_blocks > 4:
            assert work.num_blocks_merged == before[name].num_blocks_merged
            assert world.runner.store.view().groups[name].layers[0] is bulk
    of_users = before["user_activity"]
    assert (of_users.num_blocks_added, of_users.num_keys_touched) == (600, 580)  # the last two ticks closed at once
    assert of_users.num_blocks_merged < 600 * np.log2(600)
    world.crash()
