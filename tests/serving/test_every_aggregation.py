"""Groups of every aggregation beside the demo's, through all of serving: events posted, hydrated, logged, and what was logged
compared with the lake; models are given the numbers and nothing else."""

import dataclasses
from pathlib import Path

import pytest

from serving.app import create_app
from serving.forward_log import FORWARD_LOG, rows_to_table
from serving.parity import check_parity
from serving.settings import Settings
from tests.serving import hand_made
from tests.serving.hand_made import START, build_features, furnish, running, until_ready
from warehouse.clock import ManualClock
from warehouse.features.declarations import load_groups
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.time_algebra import DAY_US, FIVE_MINUTES_US, GRACE_US, HOUR_US

EVERY = load_groups(Path(__file__).parent / "every_aggregation")
GROUPS = {**load_groups(), **EVERY}
NAMED = "every_kind_of_a_reader"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(the server's explanation of its last answer, the lake once everything is landed and built)."""
    home = Home(tmp_path_factory.mktemp("home"))
    clock = ManualClock(round(START.timestamp()) * 1_000_000 + DAY_US + HOUR_US)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hand_made, "load_groups", lambda: GROUPS)
        patch.setattr("serving.engine.load_groups", lambda: GROUPS)
        furnish(home, num_users=180, num_notes=120, days=1)
        settings = dataclasses.replace(Settings.load(), l1_top_k=40, logged_share=1.0)
        with running(create_app(home, clock, settings)) as server:
            until_ready(server)
            server.wait_for_tick()
            explained = _read_and_ask(server, clock)
            clock.advance_us(2 * FIVE_MINUTES_US + GRACE_US)
            server.wait_for_tick()
            assert server.engine.forward_log.flush()
            server.engine.runner.flush()
        lake = Lake.open(home)
        build_features(lake)
    return explained, lake


def _read_and_ask(server, clock):
    """Two readers watch, one takes events back; feeds before and after each tick. The explanation of the last one."""
    number = 0
    readers = [user_id for user_id, _ in server.engine.world.readers.most_active(1)] + ["newcomer"]
    for _ in range(3):
        for reader in readers:
            for note in server.feed(reader)["notes"][:3]:
                clock.advance_us(700_001)
                for event_type in ("view", "click", "watch"):
                    number += 1
                    event = {"eventId": f"e{number}", "eventType": event_type, "userId": reader, "noteId": note["noteId"]}
                    answer = server.post("/v1/events", event | ({"watchMs": 900 + number} if event_type == "watch" else {}))
                    assert answer.status_code == 202
                back = {"eventId": f"back-{number}", "eventType": "retraction", "userId": reader, "retracts": f"e{number - 1}"}
                if number % 2:
                    assert server.post("/v1/events", back).status_code == 202
            page = server.feed(reader)
        clock.advance_us(FIVE_MINUTES_US)
        server.wait_for_tick()
        page = server.feed("newcomer")
    return server.explain(page["requestId"])


def test_every_logged_number_list_and_map_agrees_with_the_lake(served):
    _, lake = served
    parity = check_parity(lake, groups=GROUPS)
    assert parity.agrees, parity.as_text()
    assert parity.skipped == {}
    assert set(parity.vectors_of_group) == set(GROUPS)
    assert parity.vectors_of_group["every_kind_of_a_note"] > 100


def test_the_log_holds_lists_and_maps_that_are_not_empty(served):
    _, lake = served
    rows = lake.scan(FORWARD_LOG).to_pylist(maps_as_pydicts="strict")
    for group in EVERY.values():
        for name in (*group.sequence_names, *group.map_names):
            if group.name == NAMED:
                found = [(row["user_sequences"] | row["user_maps"])[name] for row in rows]
            else:
                found = [(one["sequences"] | one["maps"])[name] for row in rows for one in row["candidates"]]
            assert any(found), name


def test_an_explanation_tells_lists_and_maps(served):
    explained, _ = served
    # three notes in each of three rounds, a view, a click and a watch of each; three of the clicks were taken back
    by_type = explained["userMaps"]["user_events_by_type_1h"]
    assert by_type == {"click": 6, "view": 9, "watch": 9}
    assert explained["userSequences"]["user_top_types_1h"] == ["view", "watch"]
    assert explained["userFeatures"]["user_events_ever_session_30m"] == 24
    assert explained["userFeatures"]["user_num_notes_1d"] <= 9
    assert "note_top_readers_1d" in explained["candidates"][0]["sequences"]
    assert set(explained["candidates"][0]["maps"]) == {"note_events_by_type_1d", "author_hour_events_by_type_lifetime"}


def test_a_map_that_was_logged_otherwise_is_a_difference(served, monkeypatch):
    _, lake = served
    rows = lake.scan(FORWARD_LOG)
    last = rows.sort_by([("request_ts", "descending"), ("request_id", "ascending")]).slice(0, 1)
    [row] = last.to_pylist(maps_as_pydicts="strict")
    row["user_maps"]["user_events_by_type_1h"]["view"] += 1
    row["candidates"] = []
    monkeypatch.setattr(
        type(lake), "scan", lambda self, name, *more, **named: rows_to_table([row]) if name == FORWARD_LOG else None
    )
    assert dict(check_parity(lake, groups=GROUPS).differences_of_feature) == {"user_events_by_type_1h": 1}
