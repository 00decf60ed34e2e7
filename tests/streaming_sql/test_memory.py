"""Keys and texts that no window reaches any more leave memory, and nothing that is read changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_sql import group_state
from streaming_sql.feed import Feed
from streaming_sql.key_index import KeyIndex
from streaming_sql.online_store import OnlineStore
from streaming_sql.published import Publisher
from streaming_sql.published_ticks import PublishedTicks
from streaming_sql.text_codes import TextCodes
from tests.streaming_sql.generated import GROUPS, START_US, ListHistory, as_table
from tests.streaming_sql.test_live_store import assert_equals_oracle, begun, deliveries, times_to_ask
from warehouse.features.declarations import load_groups
from warehouse.time_algebra import FIVE_MINUTES_US, SECOND_US

SHORT = """version: 2
models:
  - name: stg_engagements
    columns: [{name: event_type}, {name: user_id}, {name: note_id}, {name: watch_ms, data_type: bigint}]
  - name: visitors
    config:
      meta:
        features:
          entity: user
          events: stg_engagements
          keys: [user_id]
          measures:
            - {name: num, aggregation: count, windows: [5m, 1h]}
            - {name: notes, aggregation: top_k, of: note_id, k: 3, windows: [1h]}
            - {name: fresh_notes, aggregation: top_k, of: note_id, k: 3, freshness: event, windows: [30m]}
"""


@pytest.fixture
def groups(tmp_path):
    folder = tmp_path / "project" / "warehouse" / "models"
    folder.mkdir(parents=True)
    (folder / "short.yml").write_text(SHORT)
    return load_groups(tmp_path / "project")


def visits(tick, number, per_tick):
    """Of users and notes that come in one tick and never again, and of one user who always comes."""
    at = START_US + tick * FIVE_MINUTES_US + 31 * SECOND_US
    users = [*(f"u{tick}-{i}" for i in range(per_tick)), "regular"]
    return [
        {
            "event_id": f"e{tick}-{i}",
            "event_type": "click",
            "user_id": user,
            "note_id": f"n{tick}-{i}",
            "event_ts": at,
            "landed_at": at + i,
            "log_partition": partition,
            "log_offset": number + i,
            "landing": "log",
        }
        for i, user in enumerate(users)
        for partition in ([0] if user != "regular" else [0, 1])
    ]


def test_a_growing_key_space_is_held_by_what_windows_reach(groups, tmp_path):
    per_tick, ticks, history = 200, 50, ListHistory()
    store = OnlineStore(groups)
    feed = Feed(store, groups, (0, 0), history)
    publisher, made, most = Publisher(tmp_path / "store", groups), PublishedTicks(tmp_path / "store", groups), 0
    followed = OnlineStore(groups)
    following = Feed(followed, groups, (0, 0), history, elsewhere=made)
    for tick in range(ticks):
        records = visits(tick, tick * (per_tick + 1), per_tick)
        before = store.view()
        for one in (feed, following):
            one.take(as_table(records))
        if store.tick_us <= 0:
            continue
        view = store.view()
        state = view.groups["visitors"]
        most = max(most, len(state.index), len(state.codes))
        now_us = max(view.tick_us, records[-1]["landed_at"] + 1)
        old = max(tick - 13, 0)  # its last window ended a tick ago, its head event long before
        keys = [("regular",), (f"u{tick - 1}-7",), (f"u{tick - 5}-7",), (f"u{old}-7",), (f"u{tick}-3",)]
        found = view.assemble("visitors", keys, now_us)
        hour = min(tick, 12)
        assert found.values[0].tolist() == [float(tick > 0), float(hour)], tick
        if tick > 14:
            assert found.values[1:, 1].tolist() == [1.0, 1.0, 0.0, 0.0]
            assert found.sequences["user_notes_1h"][2:4] == [[f"n{tick - 5}-7"], []]
            assert found.sequences["user_fresh_notes_30m"][1:] == [[f"n{tick - 1}-7"], [f"n{tick - 5}-7"], [], [f"n{tick}-3"]]
            # who holds the view before still reads what it held
            kept = before.assemble("visitors", [(f"u{tick - 2}-7",)], max(before.tick_us, now_us - FIVE_MINUTES_US))
            assert kept.sequences["user_fresh_notes_30m"] == [[f"n{tick - 2}-7"]]
        publisher.publish(view, {})
        made.look()
        following.move()
        theirs = followed.view().assemble("visitors", keys, now_us)
        assert np.array_equal(theirs.values, found.values)
        assert (theirs.sequences, followed.position) == (found.sequences, store.position)
    assert per_tick * 12 < most < per_tick * 35 < per_tick * ticks
    assert len(followed.view().groups["visitors"].index) == len(store.view().groups["visitors"].index)
    rows = store.view().groups["visitors"].index.rows()
    assert rows.max() < most  # rows are given again, so that what is as long as the largest of them stays short
    assert len(set(rows.tolist())) == len(rows)


@settings(max_examples=6)
@given(deliveries(), st.data())
def test_whatever_is_forgotten_as_soon_as_it_can_be_values_stay_the_oracles(tmp_path_factory, delivery, data):
    some = data.draw(st.lists(st.sampled_from(list(GROUPS)), min_size=1, max_size=3, unique=True))
    groups = {name: GROUPS[name] for name in some}
    events, pieces, store, history, feed = begun(delivery, groups)
    seen, held = [], []
    folder = tmp_path_factory.mktemp("store")
    publisher, ticks = Publisher(folder, groups), PublishedTicks(folder, groups)
    followed = OnlineStore(groups, position=store.position)
    following = Feed(followed, groups, store.position, history, elsewhere=ticks)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(group_state, "_FEW", 0)
        patched.setattr(group_state, "_UNUSED_AT", 1)
        patched.setattr("streaming_sql.online_store._MERGE_FACTOR", 10**6)  # all layers merge at each tick
        for piece in pieces:
            history.records += piece
            tick_us = feed.take(as_table(piece)).closed_tick_us
            seen += piece
            view = store.view()
            t_us = data.draw(st.sampled_from(times_to_ask(data.draw, view, events, seen)))
            assert_equals_oracle(view, events, t_us, groups)
            held.append((view, t_us))
            if tick_us is not None and tick_us > 0:
                publisher.publish(view, {})
                ticks.look()
            following.take(as_table(piece))
            assert (followed.tick_us, followed.position) == (store.tick_us, store.position)
            assert_equals_oracle(followed.view(), events, t_us, groups)
            held.append((followed.view(), t_us))
    for view, t_us in held[-6:]:
        assert_equals_oracle(view, events, t_us, groups)


def test_a_row_whose_key_went_is_given_to_the_next_new_key():
    index = KeyIndex(("user_id", "author_id"))
    index.extend([("a", "1"), ("b", "2"), ("c", "3")], [0, 1, 2])
    kept = index.kept(np.array([0, 2]))
    assert kept.find([("a", "1"), ("b", "2"), ("c", "3")]).tolist() == [0, -1, 2]
    assert index.find([("b", "2")]).tolist() == [1]
    assert [kept._row(key) for key in (("d", "4"), ("c", "3"), ("e", "5"))] == [1, 2, 3]
    assert (kept.keys(), kept.rows().tolist()) == ([("a", "1"), ("c", "3"), ("d", "4"), ("e", "5")], [0, 2, 1, 3])
    assert (kept.under("a"), kept.under("b"), kept.under("d")) == ([(("a", "1"), 0)], [], [(("d", "4"), 1)])
    codes = TextCodes()
    assert [codes.code(text) for text in "abc"] == [0, 1, 2]
    fewer = codes.kept(np.array([1]))
    assert [fewer.code(text) for text in "xbyz"] == [0, 1, 2, 3]
    assert (fewer.texts([0, 1, 2, 3]), codes.texts([0, 1, 2])) == (list("xbyz"), list("abc"))
