import json

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from warehouse.datasets.base import DATASET_EVENTS_SCHEMA
from warehouse.datasets.impressions import FLAGS, IMPRESSIONS_SCHEMA, LONGEST_PLAY_US, events_from_impressions, history_end_us
from warehouse.time_algebra import FIVE_MINUTES_US, MINUTE_US

NOON_US = 1_650_888_000_000_000  # 2022-04-25 12:00 UTC


def impression(number: int, view_us: int = NOON_US, play_ms: int = 0, **flags: bool) -> dict:
    ids = {"impression_id": f"i{number}", "user_id": "u1", "note_id": "n1", "author_id": "a1", "surface": "tab_1"}
    return ids | {"request_id": None, "view_us": view_us, "play_ms": play_ms} | dict.fromkeys(FLAGS, False) | flags


def events_of(*rows: dict, seed: int = 3) -> pa.Table:
    return events_from_impressions(pa.Table.from_pylist(list(rows), schema=IMPRESSIONS_SCHEMA), seed)


def by_id(events: pa.Table) -> dict[str, dict]:
    return {event["event_id"]: event for event in events.to_pylist()}


def microseconds(events: pa.Table, column: str) -> list[int]:
    return events[column].cast(pa.int64()).to_pylist()


def test_an_impression_with_nothing_done_is_one_view():
    (view,) = events_of(impression(1)).to_pylist()
    assert view["event_id"] == "view:i1"
    assert view["event_type"] == "view"
    assert view["impression_id"] == "i1"
    assert view["properties"] is None


def test_every_flag_becomes_one_event_that_carries_the_impression():
    events = events_of(impression(1, **dict.fromkeys(FLAGS, True)))
    assert sorted(events["event_type"].to_pylist()) == sorted(("view", *FLAGS))
    assert set(events["impression_id"].to_pylist()) == {"i1"}


def test_a_watch_says_how_long_in_properties_and_happens_when_the_play_ends():
    watch = by_id(events_of(impression(1, play_ms=7_000)))["watch:i1"]
    assert json.loads(watch["properties"]) == {"watch_ms": 7000}
    assert watch["event_ts"].timestamp() * 1e6 == NOON_US + 7_000_000


def test_a_loop_left_running_ends_at_the_cap_but_reports_its_whole_length():
    later = impression(2, view_us=NOON_US + 60 * MINUTE_US)
    watch = by_id(events_of(impression(1, play_ms=3_600_000), later))["watch:i1"]
    assert json.loads(watch["properties"]) == {"watch_ms": 3_600_000}
    assert watch["event_ts"].timestamp() * 1e6 == NOON_US + LONGEST_PLAY_US


def test_no_action_happens_before_its_view():
    rows = [impression(n, view_us=NOON_US, play_ms=5_000, **dict.fromkeys(FLAGS, True)) for n in range(200)]
    assert min(microseconds(events_of(*rows), "event_ts")) == NOON_US


def test_a_repeated_impression_is_the_same_events_arriving_again():
    row = impression(1, play_ms=4_000, click=True, like=True)
    events = events_of(row, row)
    assert events["event_id"].value_counts().field("counts").to_pylist() == [2, 2, 2, 2]
    assert len({(event["event_id"], event["event_ts"]) for event in events.to_pylist()}) == 4
    assert len(set(microseconds(events, "landed_at"))) == 8


def test_everything_has_landed_by_the_second_tick_after_the_last_view():
    last_view_us = NOON_US + 299_000_000
    rows = [impression(n, view_us=last_view_us, play_ms=900_000, click=True) for n in range(20_000)]
    events = events_of(*rows)
    end_us = history_end_us(last_view_us)
    assert end_us == NOON_US + 2 * FIVE_MINUTES_US
    assert max(microseconds(events, "landed_at")) == end_us
    assert max(microseconds(events, "event_ts")) < end_us


def test_among_events_that_land_together_the_view_comes_first():
    rows = [impression(n, view_us=NOON_US, play_ms=5_000, click=True) for n in range(20_000)]
    events = events_of(*rows)
    at_the_end = events.filter(pc.equal(events["landed_at"], pc.max(events["landed_at"])))
    types = at_the_end["event_type"].to_pylist()
    assert set(types) == {"view", "click", "watch"}
    assert types == sorted(types, key=("view", "click", "watch").index)


def test_no_impressions_give_no_events_in_the_same_schema():
    assert events_from_impressions(IMPRESSIONS_SCHEMA.empty_table(), 1) == DATASET_EVENTS_SCHEMA.empty_table()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_gives_the_same_events(seed):
    rows = [impression(n, play_ms=n, click=n % 2 == 0) for n in range(100)]
    assert events_of(*rows, seed=seed) == events_of(*rows, seed=seed)
    assert events_of(*rows, seed=seed) != events_of(*rows, seed=seed + 1)
