"""Gathered rows are what assembling gives, whatever was asked; only groups that stand still between ticks are held."""

import numpy as np
import pytest

from streaming_sql.assembled import Assembled, can_be_assembled
from streaming_sql.feed import Feed
from streaming_sql.online_store import OnlineStore
from streaming_sql.plan import GroupPlan
from tests.streaming_sql.generated import GROUPS, ListHistory, as_table
from tests.streaming_sql.test_live_store import VALUES_OF
from warehouse.features.declarations import load_groups
from warehouse.time_algebra import DAY_US, FIVE_MINUTES_US, MINUTE_US

START_US = 1_651_766_400_000_000  # 2022-05-05T16:00:00Z
NOTES = [("n1",), ("n2",), ("never",)]


def record(number, landed_at, **given):
    return {
        "event_id": f"e{number}", "event_type": "click", "user_id": "u1", "note_id": "n1", "author_id": "a1", "surface": None,
        "request_id": None, "impression_id": None, "event_ts": landed_at, "landed_at": landed_at, "log_partition": number % 2,
        "log_offset": number // 2, "landing": "log", "retracts": None, "properties": '{"watch_ms": 7}', **given,
    }  # fmt: skip


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
