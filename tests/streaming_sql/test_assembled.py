"""Gathered rows are what assembling gives, whatever was asked; only groups that stand still between ticks are held."""

import dataclasses
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_sql.assembled import Assembled, can_be_assembled
from streaming_sql.feed import Feed
from streaming_sql.online_store import OnlineStore
from streaming_sql.plan import GroupPlan, family_of
from streaming_sql.published import Publisher, Reading, newest_published
from streaming_sql.published_ticks import PublishedTick
from tests.streaming_sql.generated import GROUPS, ListHistory, as_table
from tests.streaming_sql.test_live_store import VALUES_OF, begun, deliveries
from warehouse.features.declarations import load_groups
from warehouse.time_algebra import DAY_US, FIVE_MINUTES_US, MINUTE_US

START_US = 1_651_766_400_000_000  # 2022-05-05T16:00:00Z
NOTES = [("n1",), ("n2",), ("never",)]


STRANGERS = [f"stranger{n}" for n in range(30)]
"""Of whom nothing ever changes: else more keys would have changed than not, and all be assembled."""


def record(number, landed_at, **given):
    return {
        "event_id": f"e{number}", "event_type": "click", "user_id": "u1", "note_id": "n1", "author_id": "a1", "surface": None,
        "request_id": None, "impression_id": None, "event_ts": landed_at, "landed_at": landed_at, "log_partition": number % 2,
        "log_offset": number // 2, "landing": "log", "retracts": None, "properties": '{"watch_ms": 7}', **given,
    }  # fmt: skip


def beat(offset, landed_at, partition):
    return record(0, landed_at, event_id=f"b{offset}", event_type="heartbeat", log_partition=partition, log_offset=offset)


@pytest.fixture
def fed():
    store, history = OnlineStore(GROUPS), ListHistory()
    feed, records = Feed(store, GROUPS, (0, 0), history), []

    def feed_ticks(num_ticks):
        for _ in range(num_ticks):
            now_us = START_US + len(records) * MINUTE_US
            some = [
                record(len(records) + i, now_us + i * MINUTE_US, note_id=f"n{i % 3}", author_id=f"a{i % 2}") for i in range(10)
            ]
            records.extend(some)
            feed.take(as_table(some))
        return store

    return feed_ticks


def rows_of(asked, held):
    return np.array([held.index(key) if key in held else -1 for key in asked])


def test_gathering_equals_assembling_for_every_group_that_is_held(fed):
    store = fed(12)
    keys = {columns: [(one,) for one in values if one] for (columns, values) in (((c,), v) for c, v in VALUES_OF.items())}
    assembled = Assembled(store.plans, keys)
    assert "note_engagement" in assembled.groups
    assembled.assemble(store.view())
    view, t_us = store.view(), store.tick_us + DAY_US // 2 + 3 * MINUTE_US
    for name in assembled.groups:
        held = keys[store.plans[name].group.entity_keys]
        asked = [held[0], ("never met",), held[-1], held[0], (None,)]
        rows = assembled.gather(view, name, rows_of(asked, held), asked.__getitem__, t_us)
        gathered = rows.matrix()
        expected = view.assemble(name, asked, t_us)
        assert gathered.names == expected.names
        assert np.array_equal(gathered.values, expected.values, equal_nan=True)
        assert (gathered.sequences, gathered.maps) == (expected.sequences, expected.maps)
        some = rows.matrix(np.array([4, 1, 0]))
        assert np.array_equal(some.values, expected.values[[4, 1, 0]], equal_nan=True)
        assert some.sequences == {column: [lists[place] for place in (4, 1, 0)] for column, lists in expected.sequences.items()}
    assert assembled.num_bytes > 0


def test_rows_that_are_not_held_have_no_stamp_however_many_they_are(fed):
    view = fed(4).view()
    assembled = Assembled({"note_engagement": view.groups["note_engagement"].plan}, {("note_id",): NOTES})
    assembled.assemble(view)
    place_C = np.array([1, *[-1] * 10, 2, 0])
    rows = assembled.gather(view, "note_engagement", place_C, lambda place: (f"stranger{place}",), view.tick_us)
    assert (rows.stamps(np.arange(len(place_C))) > 0).tolist() == (place_C >= 0).tolist()


def test_a_view_is_answered_from_its_own_tick_and_others_are_assembled_by_the_request(fed):
    store = fed(4)
    assembled = Assembled(store.plans, {("note_id",): NOTES})
    views = []
    for _ in range(3):
        views.append(fed(2).view())
        assembled.assemble(views[-1])
    assert len({view.tick_us for view in views}) == 3
    t_us = views[-1].tick_us + FIVE_MINUTES_US
    assert assembled.gather(views[0], "note_engagement", np.arange(3), NOTES.__getitem__, t_us) is None
    for view in views[1:]:
        found = assembled.gather(view, "note_engagement", np.arange(3), NOTES.__getitem__, t_us)
        assert np.array_equal(found.matrix().values, view.assemble("note_engagement", NOTES, t_us).values, equal_nan=True)
    assert assembled.gather(views[-1], "user_activity", np.arange(1), NOTES.__getitem__, t_us) is None


def keys_held(groups):
    """Of each tuple of key columns that a group is keyed by, the keys that logs have and some that none has."""
    of_columns = {group.entity_keys for group in groups.values()}
    met = {columns: itertools.product(*([one for one in VALUES_OF[name] if one] for name in columns)) for columns in of_columns}
    return {columns: [*some, *((one,) * len(columns) for one in STRANGERS)] for columns, some in met.items()}


class Moved:
    """Assembled from tick to tick, and looked at beside what assembling all gives."""

    def __init__(self, plans, keys):
        self.assembled, self.keys, self.num_kept = Assembled(plans, keys), keys, 0
        self.before = {}

    def move(self, view):
        self.assembled.assemble(view)
        for name in self.assembled.groups:
            keys = self.keys[view.groups[name].plan.group.entity_keys]
            rows = self.assembled.gather(view, name, np.arange(len(keys)), keys.__getitem__, view.tick_us)
            moved, whole, stamp_N = rows.matrix(), view.assemble(name, keys, view.tick_us), rows.stamps(np.arange(len(keys)))
            assert moved.values.tobytes() == whole.values.tobytes(), name
            assert (moved.sequences, moved.maps) == (whole.sequences, whole.maps), name
            if name in self.before:
                values_NF, stamp_before_N = self.before[name]
                same = stamp_N == stamp_before_N
                assert moved.values[same].tobytes() == values_NF[same].tobytes(), name
                assert (stamp_N >= stamp_before_N).all()
                self.num_kept += int(same.sum())
            self.before[name] = moved.values, stamp_N


def held_part(group):
    """The group with those of its measures that stand still between ticks: lists, maps and sessions among them."""
    still = tuple(measure for measure in group.measures if family_of(measure) == "tick")
    return dataclasses.replace(group, measures=still, derived=group.derived if still == group.measures else ())


STILL = {name: held_part(group) for name, group in GROUPS.items() if not group.calendar}
STILL = {name: group for name, group in STILL.items() if group.measures}
SOME_GROUPS = st.lists(st.sampled_from(list(STILL)), min_size=1, max_size=3, unique=True)


@settings(max_examples=40)
@given(deliveries(), SOME_GROUPS, st.data())
def test_moving_from_tick_to_tick_gives_what_assembling_all_gives(delivery, some, data):
    groups = {name: STILL[name] for name in some}
    _, pieces, store, history, feed = begun(delivery, groups)
    moved = Moved(store.plans, keys_held(groups))
    for piece in pieces:
        history.records += piece
        feed.take(as_table(piece))
        if data.draw(st.booleans()):  # else some ticks are never assembled
            moved.move(store.view())


@settings(max_examples=15)
@given(deliveries(), SOME_GROUPS, st.data())
def test_a_worker_moves_by_published_ticks_as_the_leader_does(delivery, some, data):
    groups = {name: STILL[name] for name in some}
    _, pieces, store, history, feed = begun(delivery, groups)
    with tempfile.TemporaryDirectory() as folder:
        publisher, reading, worker = Publisher(Path(folder), groups), Reading(groups), OnlineStore(groups)
        moved = Moved(worker.plans, keys_held(groups))
        for piece in pieces:
            history.records += piece
            feed.take(as_table(piece))
            publisher.publish(store.view(), {})
            published = newest_published(Path(folder), worker.tick_us)
            if published is not None and data.draw(st.booleans()):
                worker.advance(worker.position, {}, tick=PublishedTick(reading.view(published)))
                moved.move(worker.view())


def test_every_shape_of_feature_is_moved():
    measures = [measure for group in STILL.values() for measure in group.measures]
    assert {measure.shape for measure in measures} == {"number", "list", "map"}
    assert any(window.session_gap_us is not None for measure in measures for window in measure.windows)
    assert all(can_be_assembled(GroupPlan.of(group)) for group in STILL.values())


def test_keys_that_ticks_do_not_change_keep_their_stamps(fed):
    store = fed(4)
    keys = {("note_id",): [*NOTES, *((one,) for one in STRANGERS)]}
    moved = Moved({"note_engagement": store.plans["note_engagement"]}, keys)
    moved.move(store.view())
    for _ in range(3):
        moved.move(fed(2).view())
    assert moved.num_kept >= 3 * len(STRANGERS)


def test_what_leaves_the_longest_window_is_seen_though_a_merge_left_it_out_at_the_same_tick():
    group = GROUPS["note_engagement"]
    longest_us = max(window.length_us for measure in group.measures for window in measure.windows)
    store, moved = OnlineStore({group.name: group}), None
    feed = Feed(store, {group.name: group}, (0, 0), ListHistory())
    late_us = START_US + longest_us + FIVE_MINUTES_US
    for number, (landed_us, note) in enumerate([(START_US, "n1"), (START_US + 10 * MINUTE_US, "n2"), (late_us, "n2")]):
        feed.take(as_table([record(2 * number + part, landed_us + part, note_id=note) for part in range(2)]))
        feed.take(as_table([beat(2 * number + part + 100, landed_us + 6 * MINUTE_US, part) for part in range(2)]))
        moved = moved or Moved(store.plans, keys_held({group.name: group}))
        moved.move(store.view())
    (merged,) = store.view().groups[group.name].layers
    assert merged.block_start.min() > START_US + FIVE_MINUTES_US


def test_a_session_ends_though_no_block_leaves_a_window():
    group = STILL["sessions"]
    store = OnlineStore({group.name: group})
    feed, moved = Feed(store, {group.name: group}, (0, 0), ListHistory()), Moved(store.plans, keys_held({group.name: group}))
    feed.take(as_table([record(number, START_US) for number in range(2)]))
    values = []
    for round_, minutes in enumerate((6, 50)):
        feed.take(as_table([beat(2 * round_ + part + 100, START_US + minutes * MINUTE_US, part) for part in range(2)]))
        moved.move(store.view())
        values.append(moved.before[group.name][0])
    assert (np.nan_to_num(values[0]) > np.nan_to_num(values[1])).any()


def test_a_key_that_comes_twice_is_refused():
    with pytest.raises(ValueError, match="1 keys of note_id come twice"):
        Assembled({}, {("note_id",): [("n1",), ("n2",), ("n1",)]})


def test_no_keys_are_a_matrix_without_rows():
    groups = load_groups()
    view = OnlineStore(groups).view()
    for name, group in groups.items():
        assert view.assemble(name, [], START_US).values.shape == (0, len(group.feature_names))


def test_what_changes_with_the_request_is_never_held():
    held = {name for name, group in GROUPS.items() if can_be_assembled(GroupPlan.of(group))}
    for name in held:
        assert not GROUPS[name].calendar
        assert all(measure.freshness == "block" and measure.anchor == "tick" for measure in GROUPS[name].measures)
    assert {"note_engagement", "author_engagement", "user_author_affinity"} <= held
    assert "user_activity" not in held
    assert held < set(GROUPS)


def test_each_new_tick_is_assembled_beside_the_requests(fed):
    store = fed(4)
    assembled = Assembled({"note_engagement": GroupPlan.of(load_groups()["note_engagement"])}, {("note_id",): NOTES})
    assembled.start(store.view)
    for _ in range(2):
        view = fed(2).view()
        for _ in range(100):
            if assembled.gather(view, "note_engagement", np.arange(3), NOTES.__getitem__, view.tick_us) is not None:
                break
            assembled._stopping.wait(0.05)
        else:
            pytest.fail("the tick was not assembled within five seconds")
    assembled.stop()
