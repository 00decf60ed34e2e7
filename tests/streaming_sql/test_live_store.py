"""The live path (feed + store) against the oracle, on generated logs delivered in any interleaving of two partitions."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_sql.feed import Feed
from streaming_sql.online_store import OnlineStore
from tests.streaming_sql.generated import AUTHORS, GROUPS, NOTES, USERS, ListHistory, alive, as_table, logs, typed
from warehouse.features.oracle import Read, values
from warehouse.time_algebra import FIVE_MINUTES_US, MINUTE_US, closed_tick, floor_5m

VALUES_OF = {"user_id": USERS, "note_id": NOTES, "author_id": AUTHORS}


def keys_of(group):
    return [key for key in itertools.product(*(VALUES_OF[name] for name in group.entity_keys)) if None not in key] + [
        ("nobody",) * len(group.entity_keys)
    ]


def assert_equals_oracle(view, events, t_us, groups, keys_of=keys_of):
    """Every feature of every key of every group, to the bit for integers."""
    for group in groups.values():
        keys = keys_of(group)
        matrix = view.assemble(group.name, keys, t_us)
        assert matrix.names == group.feature_names
        for n, key in enumerate(keys):
            expected = values(group, events, Read(key, t_us, view.tick_us, view.tick_us, view.position))
            got = dict(zip(matrix.names, matrix.values[n].tolist(), strict=True))
            got |= {name: lists[n] for name, lists in matrix.sequences.items()}
            got |= {name: maps[n] for name, maps in matrix.maps.items()}
            assert set(got) == set(expected)
            for name, value in expected.items():
                at = f"{name} of {key} at t={t_us}, T={view.tick_us}, K={view.position}"
                if value is None:
                    assert math.isnan(got[name]), at
                elif isinstance(value, float):
                    assert got[name] == pytest.approx(value, rel=1e-9), at
                elif isinstance(value, dict):
                    assert list(got[name]) == list(value), at
                    assert got[name] == pytest.approx(value, rel=1e-9), at
                else:
                    assert got[name] == value, at


@st.composite
def deliveries(draw):
    """A log, and the order in which pieces of its two partitions are read."""
    records = draw(logs())
    waiting = [[record for record in records if record["log_partition"] == partition] for partition in (0, 1)]
    pieces = []
    while any(waiting):
        partition = draw(st.integers(0, 1)) if all(waiting) else int(not waiting[0])
        count = draw(st.integers(1, 6))
        pieces.append(waiting[partition][:count])
        waiting[partition] = waiting[partition][count:]
    return records, pieces


def times_to_ask(draw, view, events, seen):
    """Request times at or after the tick: now, on edges, exactly at an event and just after it."""
    now = max(record["landed_at"] for record in seen)
    near = draw(st.sampled_from(events))["event_ts"] if events else now
    candidates = [now, now + 1, floor_5m(now) + FIVE_MINUTES_US, near, near + 1, now + 70 * MINUTE_US]
    return [t for t in candidates if t >= view.tick_us]


def begun(delivery, groups):
    """(events that count, pieces of the log, store, history, feed): nothing has been read yet."""
    records, pieces = delivery
    events = [typed(record) for record in alive(records)]
    starts = tuple(min((r["log_offset"] for r in records if r["log_partition"] == p), default=0) for p in (0, 1))
    store, history = OnlineStore(groups, position=starts), ListHistory()
    return events, pieces, store, history, Feed(store, groups, starts, history)


@settings(max_examples=40)
@given(deliveries(), st.data())
def test_every_value_equals_the_oracle_whatever_the_order_of_delivery(delivery, data):
    some = data.draw(st.lists(st.sampled_from(list(GROUPS)), min_size=1, max_size=3, unique=True))
    groups = {name: GROUPS[name] for name in some}
    events, pieces, store, history, feed = begun(delivery, groups)
    held, seen = [], []
    for piece in pieces:
        history.records += piece
        feed.take(as_table(piece))
        seen += piece
        view = store.view()
        times = times_to_ask(data.draw, view, events, seen)
        t_us = data.draw(st.sampled_from(times))
        assert_equals_oracle(view, events, t_us, groups)
        held.append((view, t_us))
    newest = [max((r["landed_at"] for r in seen if r["log_partition"] == p), default=0) for p in (0, 1)]
    assert store.tick_us == (max(0, closed_tick(newest)) if all(newest) else 0)
    for view, t_us in data.draw(
        st.lists(st.sampled_from(held), max_size=2)
    ):  # views are snapshots: later records change nothing
        assert_equals_oracle(view, events, t_us, groups)
