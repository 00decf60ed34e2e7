"""Layers of blocks worked out by hand, and merging that changes no answer."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest

from streaming_sql.block_layer import BlockLayer, Blocks
from streaming_sql.key_index import KeyIndex
from streaming_sql.online_store import AddedBlocks, OnlineStore
from streaming_sql.plan import GroupPlan
from streaming_sql.text_codes import TextCodes
from warehouse.features.declarations import load_groups
from warehouse.time_algebra import FIVE_MINUTES_US, HOUR_US

GROUPS = load_groups()
NOTES = GroupPlan.of(GROUPS["note_engagement"])
TICK = datetime(2022, 5, 5, 16, tzinfo=UTC)
TICK_US = 1_651_766_400_000_000


def block(note_id, minutes_before, late_by=0, **measures):
    """A block that started so long before the tick; zeros and NULL where not given."""
    start = TICK - timedelta(minutes=minutes_before)
    row = {"note_id": note_id, "block_start": start, "known_at": start + timedelta(minutes=5 + late_by), "is_rebuilt": False}
    for family in NOTES.families:
        row |= dict.fromkeys(family.sum_columns, 0)
    return row | dict.fromkeys(NOTES.covers) | measures


def table(*blocks):
    return pa.Table.from_pylist(list(blocks))


def store_with(*ticks):
    """A store that took each list of blocks at one tick, a minute apart in name only."""
    store = OnlineStore({"note_engagement": GROUPS["note_engagement"]}, tick_us=TICK_US - 10 * FIVE_MINUTES_US)
    for number, blocks in enumerate(ticks, 1):
        tick_us = TICK_US - (len(ticks) - number) * FIVE_MINUTES_US
        store.advance((0, 0), {}, tick=AddedBlocks(tick_us, {"note_engagement": table(*blocks)}))
    return store


def values(store, note_id, t_us=TICK_US):
    matrix = store.view().assemble("note_engagement", [(note_id,)], t_us)
    return dict(zip(matrix.names, matrix.values[0].tolist(), strict=True))


def test_a_window_of_an_hour_ends_at_the_tick_and_starts_an_hour_before_it():
    store = store_with([block("n1", 65, num_views=1), block("n1", 60, num_views=10), block("n1", 5, num_views=100)])
    assert values(store, "n1")["note_num_views_1h"] == 110
    assert values(store, "n1")["note_num_views_6h"] == 111
    assert values(store, "n1", TICK_US + 20 * FIVE_MINUTES_US)["note_num_views_1h"] == 110  # anchored at the tick, not at t


def test_averages_maxima_and_ratios_of_blocks_and_of_nothing():
    store = store_with(
        [
            block("n1", 10, num_views=4, num_clicks=1, avg_watch_ms__sum=10, avg_watch_ms__n=4, max_watch_ms=7),
            block("n1", 5, num_clicks=1, avg_watch_ms__sum=-4, avg_watch_ms__n=1, max_watch_ms=3),
        ]
    )
    of_n1, of_nobody = values(store, "n1"), values(store, "nobody")
    assert (of_n1["note_avg_watch_ms_1d"], of_n1["note_max_watch_ms_1d"], of_n1["note_ctr_1d"]) == (1.2, 7, 0.5)
    assert (of_nobody["note_num_views_1d"], of_nobody["note_total_watch_ms_1d"]) == (0, 0)
    assert all(np.isnan(of_nobody[name]) for name in ("note_avg_watch_ms_1d", "note_max_watch_ms_1d", "note_ctr_1d"))


def test_a_rebuilt_block_takes_the_place_of_its_rows_in_every_older_layer():
    common = {"avg_watch_ms__sum": 4, "avg_watch_ms__n": 1}
    store = store_with(
        [block("n1", 40, num_views=1, max_watch_ms=3), block("n1", 30, num_views=2, max_watch_ms=9, **common)],
        [block("n1", 30, late_by=20, num_views=8), block("n1", 20, num_views=16), block("n2", 30, num_views=64)],
        [block("n1", 30, late_by=25, num_views=7, is_rebuilt=True, max_watch_ms=None)],
    )
    of_n1 = values(store, "n1")
    assert (of_n1["note_num_views_1h"], of_n1["note_max_watch_ms_1d"]) == (1 + 7 + 16, 3)
    assert np.isnan(of_n1["note_avg_watch_ms_1d"])
    assert values(store, "n2")["note_num_views_1h"] == 64
    blocks = store.view().explain("note_engagement", ("n1",), TICK_US).blocks
    assert sum(one["num_views"] for one in blocks) == 24


def test_a_late_row_of_a_later_tick_adds_to_its_block_and_explain_names_both_arrivals():
    store = store_with([block("n1", 30, num_views=2)], [block("n1", 30, late_by=25, num_views=1), block("n2", 5, num_views=5)])
    assert values(store, "n1")["note_num_views_1h"] == 3
    blocks = store.view().explain("note_engagement", ("n1",), TICK_US).blocks
    assert sum(one["num_views"] for one in blocks) == 3
    assert max(one["known_at"] for one in blocks) == TICK_US
    assert {one["block_start"] for one in blocks} == {TICK_US - 6 * FIVE_MINUTES_US}


def test_merging_layers_changes_no_answer_and_forgets_what_no_window_reaches():
    rng = np.random.default_rng(0)
    index, layers, everything = KeyIndex(("note_id",)), [], []
    for _ in range(5):
        rows = [
            block(
                f"n{rng.integers(6)}",
                int(rng.integers(1, 40)) * 5,
                num_views=int(rng.integers(9)),
                max_watch_ms=int(rng.integers(9)),
            )
            for _ in range(30)
        ]
        rows = list({(row["note_id"], row["block_start"]): row for row in rows}.values())
        layers.append(BlockLayer.build(NOTES, Blocks.of(NOTES, index.add(table(*rows)), table(*rows), TextCodes())))
        everything += rows
    keep_from_us = TICK_US - HOUR_US
    merged = BlockLayer.merge(NOTES, layers, keep_from_us)
    rows = np.arange(len(index))
    lower = np.array([[keep_from_us, TICK_US - HOUR_US // 2]])
    cover = NOTES.covers["max_watch_ms"]

    def read(layers):
        sums = np.zeros((len(rows), merged.prefix["tick"].shape[1], 2), dtype=np.int64)
        tops = np.full(len(rows), cover.identity)
        for layer in layers:
            layer.add_sums("tick", layer.runs_of(rows), lower, TICK_US, sums)
            layer.cover("max_watch_ms", cover, layer.runs_of(rows), keep_from_us, TICK_US, tops)
        return sums, tops

    (one, top), (parts, tops) = read([merged]), read(layers)
    np.testing.assert_array_equal(one, parts)
    np.testing.assert_array_equal(top, tops)
    assert one.sum() > 0
    assert np.isfinite(top).any()
    assert merged.block_start.min() >= keep_from_us
    assert merged.num_blocks == len(
        {(row["note_id"], row["block_start"]) for row in everything if row["block_start"] >= TICK - timedelta(hours=1)}
    )


def test_rows_of_composite_keys_stay_what_they_were():
    index = KeyIndex(("user_id", "author_id"))
    first = index.add(pa.table({"user_id": ["1", "12", "1"], "author_id": ["23", "3", "23"]}))
    assert first[0] == first[2] != first[1]
    again = index.add(pa.table({"user_id": ["12", "1"], "author_id": ["3", "2"]}))
    assert again[0] == first[1]
    assert index.find([("1", "23"), ("1", "2"), ("2", "1"), ("1", None)]).tolist() == [first[0], again[1], -1, -1]
    with pytest.raises(ValueError, match="author_id holds 1 nulls"):
        index.add(pa.table({"user_id": ["1"], "author_id": pa.array([None], pa.string())}))


def test_a_request_before_the_tick_gets_the_view_before_or_is_told():
    store = store_with([block("n1", 30, num_views=2)], [block("n1", 5, num_views=1)])
    with pytest.raises(ValueError, match="before the view's tick"):
        store.view().assemble("note_engagement", [("n1",)], TICK_US - 1)
    older = store.view(at_us=TICK_US)  # inside the grace of the newest tick
    assert older.tick_us == TICK_US - FIVE_MINUTES_US
    assert store.view(at_us=TICK_US + FIVE_MINUTES_US).tick_us == TICK_US
    with pytest.raises(ValueError, match="the tick must be after"):
        store.advance((0, 0), {}, tick=AddedBlocks(TICK_US))
