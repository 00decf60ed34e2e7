"""What a store publishes at each tick answers like the store itself: in another process, and in its own next start."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_sql.array_file import map_arrays, text_arrays, texts_of, write_arrays
from streaming_sql.published import PublishedStore, Publisher
from streaming_sql.restore import STORE_FOLDER, open_store
from streaming_sql.runner import Runner, RunnerSettings
from tests.streaming_sql.generated import GROUPS, as_table
from tests.streaming_sql.test_live_store import assert_equals_oracle, begun, deliveries, times_to_ask
from tests.streaming_sql.test_runner import GROUPS as PROJECT_GROUPS
from tests.streaming_sql.test_runner import START_US, World
from warehouse.clock import ManualClock
from warehouse.errors import HeadraceError
from warehouse.home import Home
from warehouse.time_algebra import FIVE_MINUTES_US, MINUTE_US


@settings(max_examples=25)
@given(deliveries(), st.data())
def test_every_published_tick_answers_as_the_oracle_does(tmp_path_factory, delivery, data):
    some = data.draw(st.lists(st.sampled_from(list(GROUPS)), min_size=1, max_size=3, unique=True))
    groups = {name: GROUPS[name] for name in some}
    events, pieces, store, history, feed = begun(delivery, groups)
    folder = tmp_path_factory.mktemp("store")
    publisher, reader, seen, held = Publisher(folder, groups), None, [], []
    for piece in pieces:
        history.records += piece
        tick_us = feed.take(as_table(piece)).closed_tick_us
        seen += piece
        if tick_us is None or tick_us <= 0:
            continue
        publisher.publish(store.view(), {})
        reader = reader or PublishedStore(folder, groups)
        assert reader.refresh() or reader.store.tick_us == tick_us
        view = reader.store.view()
        assert (view.tick_us, view.position) == (store.tick_us, store.position)
        t_us = data.draw(st.sampled_from(times_to_ask(data.draw, view, events, seen)))
        assert_equals_oracle(view, events, t_us, groups)
        held.append((view, t_us))
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


def test_another_process_reads_the_values_and_a_tick_writes_only_what_it_changed(tmp_path):
    world, publisher = opened(tmp_path)
    moved(world, 30)
    world.runner.publish()
    first = publisher.num_bytes_written
    world.post({"event_id": "one", "event_type": "click", "user_id": "u3"})
    world.clock.advance_us(FIVE_MINUTES_US + MINUTE_US)
    world.log.heartbeat()
    world.runner.step()
    world.runner.publish()
    assert publisher.num_bytes_written - first < first / 2
    folder = world.home.online / STORE_FOLDER
    t_us = world.clock.now_us() + 1
    code = (
        "import sys, json; from pathlib import Path\n"
        "from streaming_sql.published import PublishedStore\n"
        "from warehouse.features.declarations import load_groups\n"
        "view = PublishedStore(Path(sys.argv[1]), load_groups()).store.view()\n"
        "found = view.assemble('user_activity', [('u3',), ('nobody',)], int(sys.argv[2]))\n"
        "print(json.dumps([view.tick_us, list(view.position), found.values.tolist(), found.sequences]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(t_us)], capture_output=True, text=True, check=True)
    tick_us, position, values, sequences = json.loads(done.stdout)
    own = world.runner.store.view()
    ours = own.assemble("user_activity", [("u3",), ("nobody",)], t_us)
    assert (tick_us, tuple(position)) == (own.tick_us, own.position)
    assert np.array_equal(np.array(values, dtype=float), ours.values, equal_nan=True)
    assert sequences == ours.sequences
    assert len(sequences["user_last_clicks_30d"][0]) == 31
    world.crash()


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


@pytest.mark.parametrize("harm", ["cut", "flip", "manifest", "declarations", "import", "log"])
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
        case "import":
            manifest.write_text(json.dumps(told | {"origin": {"table": "other", "imports": []}}))
        case "log":
            manifest.write_text(json.dumps(told | {"position": [10**9, 0]}))
    world, store = restarted(world)
    assert store.blocks_through == (0, 0)
    assert bool(caplog.records) == (harm != "manifest")
    assert np.array_equal(everything(world).values, before.values, equal_nan=True)
    world.crash()


def test_a_reader_is_told_what_is_missing(tmp_path):
    with pytest.raises(HeadraceError, match=r"nothing is published in .*headrace stream run"):
        PublishedStore(tmp_path, PROJECT_GROUPS)
    world, _ = opened(tmp_path)
    moved(world, 2)
    world.runner.publish()
    with pytest.raises(HeadraceError, match="published for other declarations"):
        PublishedStore(world.home.online / STORE_FOLDER, {"user_activity": PROJECT_GROUPS["user_activity"]})
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
