"""Moments, sessions, lists and maps worked out by hand."""

import numpy as np
import pyarrow as pa
import pytest

from streaming_sql import moments
from streaming_sql.entry_maps import EntryMaps, MapShape, buckets, most_frequent
from streaming_sql.event_lists import ENTRY_SCHEMA, EventLists, chosen
from streaming_sql.ragged import places
from streaming_sql.sessions import session_starts
from streaming_sql.text_codes import TextCodes
from tests.parity.test_batch_equals_oracle import GROUPS
from warehouse.time_algebra import FIVE_MINUTES_US, session_start

BLOCK = FIVE_MINUTES_US
MEASURES = {(name, measure.name): measure for name, group in GROUPS.items() for measure in group.measures}


def moments_of(*values):
    return [len(values), np.mean(values), np.var(values) * len(values)] if values else list(moments.NOTHING)


def test_moments_keep_the_digits_of_a_small_spread_around_a_large_mean():
    large = 1e9
    parts = np.array([moments_of(large + 1, large + 2), moments_of(), moments_of(large + 3), moments_of(large + 6)])
    by_group = moments.merged_by(parts, np.array([0, 2]))
    assert moments.variance(by_group).tolist() == pytest.approx([0.5, 4.5])
    assert moments.variance(moments.merged(by_group[:1], by_group[1:])).tolist() == pytest.approx([14 / 3])
    assert np.isnan(moments.variance(np.array([moments_of(), moments_of(7)]))).all()


def test_sessions_of_many_keys_are_those_of_each_alone():
    rng = np.random.default_rng(3)
    upper_us, gap_us = 100 * BLOCK + 7, 2 * BLOCK
    owner = rng.integers(0, 40, 300)
    block_us = rng.integers(0, 101, 300) * BLOCK
    starts = session_starts(owner, block_us, 41, upper_us, gap_us)
    for key in range(41):
        alone = session_start(block_us[owner == key].tolist(), upper_us, gap_us)
        assert starts[key] == (101 * BLOCK if alone is None else alone)
    assert (starts < 101 * BLOCK).sum() > 5
    assert starts[40] == 101 * BLOCK  # nothing ever happened


def lists_of(measure, entries):
    columns = list(zip(*entries, strict=True))
    return EventLists.of(pa.table(list(columns), schema=ENTRY_SCHEMA), measure)


def test_lists_keep_what_their_aggregation_wants_of_each_block_in_total_order():
    entries = [(0, 9, "b", "w"), (0, 9, "a", "x"), (0, 2, "z", "y"), (1, 4, "q", "z"), (0, 1, "a", "x")]
    row, nothing = np.array([0]), np.array([-1])
    for name, expected in (("first_users", ["x", "y"]), ("distinct_users", ["x", "w"])):
        measure = MEASURES["moments_and_events", name]
        held = lists_of(measure, entries)
        _, *found = held.found(measure, row, 0, BLOCK)
        assert chosen(measure, zip(*found, strict=True)) == expected
        assert [len(part) for part in held.found(measure, nothing, 0, BLOCK)] == [0, 0, 0, 0]
        assert len(held.without(places(np.array([0]), np.array([0]))).row) == 1


def test_the_newest_distinct_values_are_found_behind_many_equal_ones():
    measure = MEASURES["moments_and_events", "distinct_users"]
    entries = [(0, block * BLOCK, f"e{block:02}", "often" if block else "once") for block in range(50)]
    _, *found = lists_of(measure, entries).found(measure, np.array([0]), 0, 50 * BLOCK)
    assert chosen(measure, zip(*found, strict=True)) == ["once", "often"]


def test_maps_add_up_over_blocks_and_break_ties_by_bytes():
    shape, codes = MapShape.of(MEASURES["maps", "top_users"]), TextCodes()
    entries = pa.list_(pa.struct({"entry": pa.string(), "value": pa.int64()}))
    lists = pa.chunked_array([pa.array([[("é", 2), ("z", 1)], None, [("z", 1), ("a", 2)]], entries)])
    row, start = np.array([0, 0, 0]), np.array([0, BLOCK, 2 * BLOCK])
    maps = EntryMaps.of_lists(shape, row, start, [lists], codes)
    found = maps.found(np.array([0, 5]), 0, 3 * BLOCK)
    grouped = type(found).grouped(shape, [found])
    assert most_frequent(grouped, 2, 2, codes) == [["a", "z"], []]
    assert most_frequent(grouped, 2, 9, codes) == [["a", "z", "é"], []]
    assert buckets(grouped, 2, False, codes) == [{"a": 2.0, "z": 2.0, "é": 2.0}, {}]
    assert list(buckets(grouped, 1, False, codes)[0]) == ["a", "z", "é"]
    assert len(maps.without(places(np.array([0]), np.array([0]))).entry) == 2
