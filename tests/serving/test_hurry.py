"""A request that runs out of time: what it leaves out, in which order, and that there is a page all the same."""

import dataclasses
import time

import pytest

from serving.budget import Budget, Pace
from serving.last_pages import LastPages


def paced(**ms_per_candidate: float) -> Pace:
    """A pace that was measured at 1,000 candidates."""
    pace = Pace()
    for stage, ms in ms_per_candidate.items():
        pace.note(stage, ms * 1000, 1000)
    return pace


def test_a_pace_follows_what_it_measures_and_forgets_what_it_skips():
    pace = paced(l2=0.05)
    assert pace.expected_ms(["l2", "never measured"], 200) == pytest.approx(10)
    assert pace.expected_ms(["l2"], 1) == pytest.approx(5)  # few cost as much as a hundred
    assert pace.most_candidates(["l2"], 20) == 400
    assert pace.most_candidates(["never measured"], 0.001) is None
    for _ in range(60):
        pace.note("l2", 20, 200)
    assert pace.expected_ms(["l2"], 200) == pytest.approx(20, rel=0.01)
    for _ in range(50):
        pace.skipped("l2")
    assert pace.expected_ms(["l2"], 200) < 0.2


def test_a_budget_counts_down():
    budget = Budget.of_ms(50)
    assert 0 < budget.left_ms() <= 50
    time.sleep(0.06)
    assert budget.left_ms() < 0
    assert Budget().left_ms() == float("inf")


@pytest.fixture
def pace(server):
    """Replaces the server's pace for one test, so that stages seem to take what the test says."""
    world = server.engine.world

    def replaced(**ms_per_candidate):
        server.engine.world = dataclasses.replace(world, pace=paced(**ms_per_candidate), last_pages=LastPages(100, 10))
        return server.engine.world

    yield replaced
    server.engine.world = world


def test_with_time_nothing_is_left_out(server, readers, pace):
    pace(hydrate_candidates=0.01, l1=0.01, l2=0.1, policy=0.01)
    assert server.feed(readers[0], deadlineMs=10_000)["degraded"] == []


def test_l2_is_skipped_before_the_page_is_late_and_tried_again_later(server, readers, pace):
    world = pace(hydrate_candidates=0.001, l1=0.001, l2=1000.0, policy=0.001)
    answer = server.feed(readers[0], deadlineMs=2000)
    assert answer["degraded"] == ["l2_skipped"]
    assert [note["finalScore"] for note in answer["notes"]] == [note["l1Score"] for note in answer["notes"]]
    assert len(answer["notes"]) == 20
    for _ in range(100):
        world.pace.skipped("l2")
    assert server.feed(readers[0], deadlineMs=2000)["degraded"] == []


def test_fewer_candidates_are_ranked_when_that_is_what_there_is_time_for(server, readers, pace):
    pace(hydrate_candidates=10.0, l1=0.001, policy=0.001)  # a hundred take a second
    answer = server.feed(readers[27], deadlineMs=1600)  # of whom no candidates are kept
    assert set(answer["degraded"]) == {"generators_skipped", "candidates_cut"} or answer["degraded"] == ["generators_skipped"]
    assert len(answer["notes"]) == 20
    candidates = server.explain(answer["requestId"])["candidates"]
    assert len(candidates) < 200


def test_with_no_time_at_all_the_last_page_is_shown_again_or_what_is_trending(server, readers, pace):
    world = pace(hydrate_candidates=1000.0)
    first = server.feed(readers[1], deadlineMs=100)
    assert first["degraded"] == ["trending_page"]
    assert len(first["notes"]) == 20
    assert {source for note in first["notes"] for source in note["sources"]} <= {"trending", "fresh"}
    server.engine.world = dataclasses.replace(world, pace=Pace())
    ranked = server.feed(readers[1], deadlineMs=10_000)
    server.engine.world = dataclasses.replace(world, pace=paced(hydrate_candidates=1000.0))
    again = server.feed(readers[1], deadlineMs=100)
    assert again["degraded"] == ["cached_page"]
    assert again["requestId"] != ranked["requestId"]
    assert [note["noteId"] for note in again["notes"]] == [note["noteId"] for note in ranked["notes"]]
    assert [note["finalScore"] for note in again["notes"]] == [note["finalScore"] for note in ranked["notes"]]
    told = server.explain(again["requestId"])
    assert [item["features"] for item in told["candidates"]] == [None] * 20
    click = {
        "eventId": f"hurry-{readers[1]}",
        "eventType": "click",
        "userId": readers[1],
        "noteId": again["notes"][0]["noteId"],
    }
    assert server.post("/v1/events", click).status_code == 202
    assert server.feed(readers[1], deadlineMs=100)["degraded"] == ["trending_page"]


def test_a_slow_l2_is_learned_of(server, readers, pace):
    world = pace()
    model = world.models.l2

    class Slow:
        user_features, note_features = model.user_features, model.note_features

        def score_many(self, requests):
            time.sleep(1.5)
            return model.score_many(requests)

    server.engine.world = dataclasses.replace(world, models=dataclasses.replace(world.models, l2=Slow()))
    assert server.feed(readers[2], deadlineMs=1250)["degraded"] == []  # nobody knew
    started = time.perf_counter()
    assert server.feed(readers[2], deadlineMs=1250)["degraded"] == ["l2_skipped"]
    assert time.perf_counter() - started < 1.5


@pytest.mark.parametrize("wrong", [0, -5, "soon", 1e9])
def test_a_deadline_that_cannot_be_is_refused(server, readers, wrong):
    assert server.post("/v1/feed", {"userId": readers[0], "deadlineMs": wrong}).status_code == 422


def test_last_pages_are_bounded_and_grow_old():
    class Page:
        def __init__(self, user_id, t_us=0, feed_type="EXPLORE"):
            self.user_id, self.feed_type, self.t_us, self.page = user_id, feed_type, t_us, [1]

    pages = LastPages(2, minutes=1)
    for user_id in ("a", "b", "c"):
        pages.keep(Page(user_id))
    assert pages.get("a", "EXPLORE", 0) is None
    assert pages.get("c", "EXPLORE", 60_000_000).user_id == "c"
    assert pages.get("c", "EXPLORE", 60_000_001) is None
    assert pages.get("c", "FOLLOW", 0) is None
    pages.forget("c")
    assert pages.get("c", "EXPLORE", 0) is None
