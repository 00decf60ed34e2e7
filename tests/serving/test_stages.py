"""The stages one by one, and what happens when one of them breaks."""

import dataclasses

import numpy as np
import pytest


def retrieved(server, reader, limit=60):
    answer = server.post("/v1/retrieve", {"userId": reader, "feedType": "EXPLORE", "limit": limit})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_stages_chained_by_hand_give_the_feeds_order(server, readers):
    reader = readers[3]
    candidates = retrieved(server, reader, 5000)
    l1 = server.post(
        "/v1/rank/l1", {"userId": reader, "candidates": candidates, "topK": server.engine.settings.l1_top_k}
    ).json()
    l2 = server.post("/v1/rank/l2", {"userId": reader, "candidates": l1, "topK": 100}).json()
    feed = server.feed(reader)["notes"]
    assert [note["position"] for note in l2] == list(range(100))
    by_hand = {note["noteId"]: note for note in l2}
    for note in feed:
        assert note["finalScore"] == pytest.approx(by_hand[note["noteId"]]["finalScore"], rel=2e-6)
        assert note["l1Score"] == pytest.approx(by_hand[note["noteId"]]["l1Score"], rel=2e-6)
        assert note["sources"] == by_hand[note["noteId"]]["sources"]
        assert note["recallScore"] == by_hand[note["noteId"]]["recallScore"]


def test_retrieval_is_limited_and_best_first(server, readers):
    notes = retrieved(server, readers[0], 7)
    assert len(notes) == 7
    scores = [note["recallScore"] for note in notes]
    assert scores == sorted(scores, reverse=True)
    assert all(note["source"] == note["sources"][0] for note in notes)


@pytest.mark.parametrize("stage", ["l1", "l2"])
def test_a_candidates_score_does_not_depend_on_its_company(server, readers, stage):
    candidates = retrieved(server, readers[0])
    score = "l1Score" if stage == "l1" else "finalScore"

    def scores(some):
        ranked = server.post(f"/v1/rank/{stage}", {"userId": readers[0], "candidates": some, "topK": 1000}).json()
        return {note["noteId"]: note[score] for note in ranked}

    together = scores(candidates)
    backwards = scores(candidates[::-1])
    for candidate in candidates[:5]:
        note_id = candidate["noteId"]
        assert scores([candidate])[note_id] == pytest.approx(together[note_id], abs=2e-6)
        assert backwards[note_id] == pytest.approx(together[note_id], abs=2e-6)


@pytest.mark.parametrize("stage", ["l1", "l2"])
def test_top_k_duplicates_and_notes_nobody_knows(server, readers, stage):
    known = retrieved(server, readers[0])[:4]
    candidates = [{"noteId": "unheard-of"}, *known, known[0], {"noteId": "unheard-of"}]
    ranked = server.post(f"/v1/rank/{stage}", {"userId": readers[0], "candidates": candidates, "topK": 1000}).json()
    assert sorted(note["noteId"] for note in ranked) == sorted(["unheard-of", *(note["noteId"] for note in known)])
    score = "l1Score" if stage == "l1" else "finalScore"
    assert all(isinstance(note[score], float) for note in ranked)
    three = server.post(f"/v1/rank/{stage}", {"userId": readers[0], "candidates": candidates, "topK": 3}).json()
    assert three == ranked[:3]


@pytest.mark.parametrize("stage", ["l1", "l2"])
def test_no_candidates_is_an_empty_ranking(server, stage):
    answer = server.post(f"/v1/rank/{stage}", {"userId": "u", "candidates": []})
    assert (answer.status_code, answer.json()) == (200, [])
    assert "headrace-degraded" not in answer.headers


class Raises:
    user_features: tuple = ()
    note_features: tuple = ()

    def score_many(self, requests):
        raise RuntimeError("weights torn")


class NotANumber(Raises):
    def __init__(self, of_heads=False):
        self._of_heads = of_heads

    def score_many(self, requests):
        answers = [np.zeros(len(request.notes), dtype=np.float32) for request in requests]
        for scores in answers:
            scores[:1] = np.nan
        return [{"click": scores} for scores in answers] if self._of_heads else answers


def not_a_number_of_heads():
    return NotANumber(of_heads=True)


@pytest.fixture
def models(server):
    """Replaces models for one test."""
    world = server.engine.world

    def replaced(**models):
        server.engine.world = dataclasses.replace(world, models=dataclasses.replace(world.models, **models))

    yield replaced
    server.engine.world = world


@pytest.mark.parametrize("broken", [Raises, not_a_number_of_heads])
def test_without_l2_the_order_of_l1_stands(server, readers, models, broken):
    models(l2=broken())
    answer = server.feed(readers[0])
    assert answer["degraded"] == ["l2"]
    assert len(answer["notes"]) == 20
    assert [note["finalScore"] for note in answer["notes"]] == [note["l1Score"] for note in answer["notes"]]
    assert all(note["predictions"] == {} for note in answer["notes"])


@pytest.mark.parametrize("broken", [Raises, NotANumber])
def test_without_any_model_the_order_of_recall_stands(server, readers, models, broken):
    models(l1=broken(), l2=Raises(), item_to_item=None, two_tower=None)
    answer = server.feed(readers[0])
    assert set(answer["degraded"]) == {"item_to_item", "two_tower", "l1", "l2"}
    assert len(answer["notes"]) == 20
    assert all(note["l1Score"] is None for note in answer["notes"])
    scores = [note["recallScore"] for note in answer["notes"]]
    assert scores == sorted(scores, reverse=True)


def test_a_stage_that_broke_alone_is_named_in_a_header(server, readers, models):
    models(l1=Raises())
    candidates = [{"noteId": "a"}, {"noteId": "b"}]
    answer = server.post("/v1/rank/l1", {"userId": readers[0], "candidates": candidates})
    assert answer.headers["headrace-degraded"] == "l1"
    assert [(note["noteId"], note["l1Score"]) for note in answer.json()] == [("a", None), ("b", None)]
