"""The feed through HTTP: its shape, where notes come from, and what a reader's own events change."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from serving.cascade import drawn
from serving.request import CLOCK_BEHIND, begin
from serving.retrieve import GENERATORS
from tests.serving.hand_made import NOT_YET
from warehouse.clock import ManualClock
from warehouse.datasets.simulator import CITIES
from warehouse.time_algebra import FIVE_MINUTES_US, GRACE_US, HOUR_US, SECOND_US

NOTE_FIELDS = {
    "position", "noteId", "authorId", "topic", "impressionId", "source", "sources",
    "recallScore", "l1Score", "predictions", "finalScore", "slot", "propensity",
}  # fmt: skip


def next_tick(server, clock):
    clock.advance_us(FIVE_MINUTES_US + GRACE_US)
    server.wait_for_tick()


def event(event_id, user_id, note, event_type="click", **more):
    return {"eventId": event_id, "eventType": event_type, "userId": user_id, "noteId": note["noteId"], **more}


def test_each_candidate_is_drawn_for_the_log_with_its_share():
    taken = [drawn(seed, 2000, 0.05) for seed in range(500)]
    number_C = np.bincount(np.concatenate(taken), minlength=2000)
    assert abs(number_C.sum() / 500 / 2000 - 0.05) < 0.001
    assert number_C.max() < 25 + 5 * 25**0.5  # no place is preferred
    assert np.array_equal(drawn(3, 2000, 0.05), taken[3])
    assert all((np.diff(places) > 0).all() for places in taken)
    assert drawn(1, 50, 1.0).tolist() == list(range(50))
    assert drawn(1, 50, 0.0).tolist() == drawn(1, 0, 1.0).tolist() == []


def test_a_feed_is_a_page_of_distinct_notes_best_first(server, readers):
    answer = server.feed(readers[0])
    assert set(answer) == {
        "requestId", "modelVersion", "modelVersions", "requestTs", "featureWatermark", "knownPosition",
        "notes", "degraded", "cached", "numCandidates", "timings",
    }  # fmt: skip
    notes = answer["notes"]
    assert all(set(note) == NOTE_FIELDS for note in notes)
    assert len({note["noteId"] for note in notes}) == len(notes) == 20
    assert [note["position"] for note in notes] == list(range(20))
    assert [note["impressionId"] for note in notes] == [f"{answer['requestId']}:{place}" for place in range(20)]
    assert answer["degraded"] == []
    assert answer["modelVersion"] == answer["modelVersions"]["l2"]
    assert set(answer["modelVersions"]) == {"item_to_item", "two_tower", "l1", "l2"}
    assert set(answer["timings"]) >= {"hydrate_user", "retrieve", "hydrate_candidates", "l1", "l2", "policy", "total"}
    finals = [note["finalScore"] for note in notes]
    assert finals == sorted(finals, reverse=True)
    assert max(Counter(note["authorId"] for note in notes).values()) <= 2


def test_the_final_score_is_the_weighted_mix_of_the_heads(server, readers):
    weights = server.engine.settings.head_weights
    for note in server.feed(readers[0])["notes"]:
        assert all(0 <= probability <= 1 for probability in note["predictions"].values())
        mixed = sum(weights.get(head, 0.0) * probability for head, probability in note["predictions"].items())
        assert note["finalScore"] == pytest.approx(mixed)


def test_a_reader_with_a_past_is_served_by_every_generator(server, readers):
    sources = {source for reader in readers[:5] for note in server.feed(reader)["notes"] for source in note["sources"]}
    candidates = server.explain(server.feed(readers[0])["requestId"])["candidates"]
    sources |= {source for candidate in candidates for source in candidate["sources"]}
    assert sources == set(GENERATORS) - {"promoted", "nearby"}  # nothing is promoted, and nobody said where they are


def test_a_reader_never_met_gets_what_is_trending_and_fresh(server):
    answer = server.feed("nobody-knows-me")
    assert len(answer["notes"]) == 20
    # the two-tower of these tests reads the reader's features, of which it has the empty values
    assert {source for note in answer["notes"] for source in note["sources"]} <= {"trending", "fresh", "two_tower"}
    assert answer["degraded"] == []
    user_features = server.explain(answer["requestId"])["userFeatures"]
    assert user_features["user_num_views_7d"] == 0
    assert user_features["user_ctr_7d"] is None


def test_notes_that_the_reader_has_seen_are_kept_out(server, readers):
    seen = set(server.engine.world.readers.seen(readers[0]))
    assert len(seen) > 20
    candidates = server.explain(server.feed(readers[0])["requestId"])["candidates"]
    assert seen.isdisjoint(candidate["noteId"] for candidate in candidates)


def test_notes_of_the_future_are_not_shown(server, readers):
    assert NOT_YET in server.engine.world.catalogue.row_of
    for reader in (*readers[:3], "nobody"):
        found = server.post("/v1/retrieve", {"userId": reader, "limit": 5000}).json()
        assert NOT_YET not in {note["noteId"] for note in found}


@pytest.mark.parametrize("limit", [1, 7, 50])
def test_the_page_has_as_many_notes_as_asked_for(server, readers, limit):
    assert len(server.feed(readers[1], limit=limit)["notes"]) == limit


def test_following_an_author_fills_the_follow_feed_with_their_notes(server, clock):
    reader = "follows-one"
    assert server.feed(reader, feedType="FOLLOW")["degraded"] == ["no_followed_notes"]
    note = server.feed(reader)["notes"][0]
    follow = {"eventId": f"follow-{reader}", "eventType": "follow", "userId": reader, "authorId": note["authorId"]}
    assert server.post("/v1/events", follow).status_code == 202
    answer = server.feed(reader, feedType="FOLLOW")
    assert {shown["authorId"] for shown in answer["notes"]} == {note["authorId"]}
    assert note["noteId"] in {shown["noteId"] for shown in answer["notes"]}
    assert "no_followed_notes" not in answer["degraded"]


def test_nearby_shows_notes_of_the_place_that_the_request_names(server, readers):
    catalogue = server.engine.world.catalogue
    near = catalogue.places.nearest(CITIES[0], np.ones(len(catalogue), bool), len(catalogue))
    answer = server.feed(readers[2], feedType="NEARBY", context={"geohash": CITIES[0]}, limit=10)
    assert {note["noteId"] for note in answer["notes"]} <= {catalogue.note_ids[row] for row in near}
    assert all(note["sources"] == ["nearby"] for note in answer["notes"])
    assert not {"nearby_without_geohash", "no_nearby_notes"} & set(answer["degraded"])


@pytest.mark.parametrize(
    ("context", "told"), [({}, "nearby_without_geohash"), ({"geohash": "nnnnn"}, "no_nearby_notes")], ids=["no place", "at sea"]
)
def test_nearby_with_nothing_near_says_so_and_serves_the_general_feed(server, readers, context, told):
    answer = server.feed(readers[2], feedType="NEARBY", context=context)
    assert answer["degraded"] == [told]
    assert len(answer["notes"]) == 20


def test_a_click_counts_in_the_very_next_request_and_hides_the_note(server, clock):
    reader = "clicks-once"
    before = server.feed(reader)
    note = before["notes"][3]
    clock.advance_us(SECOND_US)
    posted = server.post("/v1/events", event("click-1", reader, note, impressionId=note["impressionId"]))
    assert posted.status_code == 202
    clock.advance_us(1)
    after = server.feed(reader)
    was, now = server.explain(before["requestId"]), server.explain(after["requestId"])
    changed = {name for name, value in now["userFeatures"].items() if value != was["userFeatures"][name]}
    assert {"user_num_clicks_5m", "user_num_clicks_1h", "user_num_clicks_1d", "user_num_clicks_7d"} <= changed
    assert now["userFeatures"]["user_num_clicks_5m"] == 1
    assert now["userSequences"]["user_last_clicks_30d"] == [note["noteId"]]
    assert now["featureWatermark"] == was["featureWatermark"]
    assert note["noteId"] not in {shown["noteId"] for shown in after["notes"]}
    result = posted.json()["results"][0]
    assert now["knownPosition"][result["partition"]] > result["offset"] >= was["knownPosition"][result["partition"]]


def test_a_clicks_neighbours_come_next(server, clock):
    reader, world = "wants-more", server.engine.world
    known = (note_id for note_id in world.catalogue.note_ids if len(world.models.item_to_item.neighbours([note_id], 5)) == 5)
    note = {"noteId": next(known)}
    clock.advance_us(1)
    assert server.post("/v1/events", event("more-1", reader, note)).status_code == 202
    clock.advance_us(1)
    candidates = server.explain(server.feed(reader)["requestId"])["candidates"]
    assert any("item_to_item" in candidate["sources"] for candidate in candidates)


def test_an_event_sent_twice_counts_once_and_keeps_its_place(server, clock):
    reader = "sends-twice"
    note = server.feed(reader)["notes"][0]
    click = event("same-id", reader, note)
    clock.advance_us(1)
    first, second = server.post("/v1/events", click).json(), server.post("/v1/events", click).json()
    assert first["results"] == second["results"]
    clock.advance_us(1)
    assert server.explain(server.feed(reader)["requestId"])["userFeatures"]["user_num_clicks_5m"] == 1


def test_a_notes_features_move_at_the_next_tick_and_not_before(server, clock):
    onlooker, reader = "looks-on", "clicks-a-lot"
    next_tick(server, clock)  # what other tests posted is in the blocks by now
    served = server.feed(onlooker)
    note = served["notes"][0]

    def features(answer):
        return server.explain(answer["requestId"], note["noteId"])["candidates"][0]["features"]

    before = features(served)
    clock.advance_us(1)
    batch = [event(f"lot-{kind}", reader, note, kind) for kind in ("view", "click", "like")]
    assert server.post("/v1/events", {"events": batch}).json()["accepted"] == 3
    clock.advance_us(1)
    same_tick = server.feed(onlooker)
    assert same_tick["featureWatermark"] == served["featureWatermark"]
    blocks_before = {name: value for name, value in before.items() if name != "note_age_min"}
    assert blocks_before == {name: value for name, value in features(same_tick).items() if name != "note_age_min"}

    next_tick(server, clock)
    after = features(server.feed(onlooker))
    for kind in ("views", "clicks"):
        assert after[f"note_num_{kind}_1h"] == before[f"note_num_{kind}_1h"] + 1
    assert after["note_num_likes_7d"] == before["note_num_likes_7d"] + 1


def test_one_request_has_one_tick_and_one_position(server, readers):
    answer = server.feed(readers[0])
    told = server.explain(answer["requestId"])
    assert (told["featureWatermark"], told["knownPosition"]) == (answer["featureWatermark"], answer["knownPosition"])


def test_a_clock_that_was_set_back_does_not_empty_the_feed(server, readers):
    world = server.engine.world
    tick_us = world.store.view().tick_us
    request = begin(dataclasses.replace(world, clock=ManualClock(tick_us - HOUR_US)), readers[0])
    assert (request.view.tick_us, request.t_us) == (tick_us, tick_us + GRACE_US)
    assert request.steps.degraded == [CLOCK_BEHIND]
    assert begin(world, readers[0]).steps.degraded == []


def test_when_all_notes_are_seen_the_page_is_filled_again_and_says_so(server, clock):
    reader, catalogue = "has-seen-all", server.engine.world.catalogue
    clock.advance_us(1)
    for start in range(0, len(catalogue), 500):
        views = [
            event(f"all-{n}", reader, {"noteId": catalogue.note_ids[n]}, "view")
            for n in range(start, min(start + 500, len(catalogue)))
        ]
        assert server.post("/v1/events", {"events": views}).status_code == 202
    answer = server.feed(reader)
    assert len(answer["notes"]) == 20
    assert answer["degraded"] == ["seen_filter_relaxed"]
