"""The policy through HTTP: places kept for some notes, propensities in the log, and what may never be shown."""

import dataclasses

import pytest

from serving.app import create_app
from serving.page import allowed_notes
from serving.settings import Settings
from tests.serving.hand_made import START, furnish, running, until_ready
from warehouse.clock import ManualClock
from warehouse.home import Home
from warehouse.time_algebra import DAY_US, HOUR_US


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("page"))
    dataset = furnish(home, num_users=180, num_notes=200, days=1)
    blocked, *others = dict.fromkeys(dataset.notes["author_id"].to_pylist())
    notes = sorted(dataset.notes.to_pylist(), key=lambda note: note["created_at"])
    promoted = next(note["note_id"] for note in notes if note["author_id"] == others[0])
    settings = dataclasses.replace(
        Settings.load(),
        l1_top_k=40,
        deadline_ms=60_000.0,
        promoted_notes=[promoted],
        promoted_positions=[0],
        cold_start_hours=9.0,
        cold_start_positions=[2],
        exploration_positions=[5, 7],
        exploration_share=0.5,
        blocked_authors=[blocked],
    )
    clock = ManualClock(round(START.timestamp()) * 1_000_000 + DAY_US + HOUR_US)
    with running(create_app(home, clock, settings)) as server:
        until_ready(server)
        server.wait_for_tick()
        yield server


@pytest.fixture(scope="module")
def readers(server):
    return [user_id for user_id, _ in server.engine.world.readers.most_active(40)]


def test_places_are_taken_by_what_they_are_kept_for(server, readers):
    world = server.engine.world
    promoted = world.settings.promoted_notes[0]
    explored = promoted_to = 0
    for reader in readers[:20]:
        answer = server.feed(reader)
        notes = answer["notes"]
        assert len(notes) == 20
        by_slot = {note["position"]: note["slot"] for note in notes}
        if promoted not in {*world.readers.seen(reader), *world.readers.history_before_the_log(reader)}:
            promoted_to += 1
            assert (notes[0]["noteId"], by_slot[0]) == (promoted, "promoted")
        assert by_slot[2] == "cold_start"
        row = world.catalogue.row_of[notes[2]["noteId"]]
        assert world.catalogue.freshness_us[row] >= world.clock.now_us() - 9 * HOUR_US
        assert all(0 < note["propensity"] < 1 for note in notes if note["position"] in (5, 7))
        assert all(note["propensity"] == 1 for note in notes if note["position"] not in (5, 7))
        explored += sum(slot == "exploration" for slot in by_slot.values())
    assert 0 < explored < 40
    assert promoted_to > 2


def test_the_forward_log_keeps_slot_and_propensity(server, readers):
    answer = server.feed(readers[0])
    server.engine.forward_log.flush()
    server.engine.recent._served.clear()  # so that the lake is asked
    shown = [item for item in server.explain(answer["requestId"])["candidates"] if item["stageReached"] == "shown"]
    told = {note["noteId"]: (note["slot"], note["propensity"]) for note in answer["notes"]}
    assert {item["noteId"]: (item["slot"], item["propensity"]) for item in shown} == told


def test_what_is_blocked_or_hidden_is_never_shown_though_seen_notes_may_be(server, readers):
    world, reader = server.engine.world, readers[1]
    hidden = server.feed(reader)["notes"][10]["noteId"]
    event = {"eventId": "h1", "eventType": "hide", "userId": reader, "noteId": hidden}
    assert server.post("/v1/events", event).status_code == 202
    answer = server.feed(reader, limit=200)
    shown = [note["noteId"] for note in answer["notes"]]
    assert "seen_filter_relaxed" in answer["degraded"]
    blocked = {
        note
        for note, author in zip(world.catalogue.note_ids, world.catalogue.author_ids, strict=True)
        if author in world.settings.blocked_authors
    }
    assert blocked
    assert not blocked & set(shown)
    assert hidden not in shown
    back = {"eventId": "h2", "eventType": "retraction", "userId": reader, "retracts": "h1"}
    assert server.post("/v1/events", back).status_code == 202
    again = server.explain(server.feed(reader, limit=200)["requestId"])
    assert hidden in [item["noteId"] for item in again["candidates"]]  # whether L1 hands it on is L1's affair


def test_a_page_of_one_topic_is_less_of_one_topic_with_diversity(server, readers):
    world = server.engine.world

    def alike(**changes):
        """Mean cosine of neighbours on the pages."""
        server.engine.world = dataclasses.replace(
            world, settings=dataclasses.replace(world.settings, exploration_share=0.0, **changes)
        )
        total, number = 0.0, 0
        for reader in readers[:10]:
            rows = [world.catalogue.row_of[note["noteId"]] for note in server.feed(reader)["notes"]]
            vectors = world.models.two_tower.note_vectors[world.models.vector_of_row[rows]]
            total += float((vectors[1:] * vectors[:-1]).sum())
            number += len(rows) - 1
        return total / number

    try:
        plain = alike(diversity="none")
        assert alike(diversity="ssd", diversity_strength=1.0, max_displacement=20) < plain - 0.02
        assert alike(diversity="mmr", diversity_strength=1.0, max_displacement=20) < plain - 0.02
    finally:
        server.engine.world = world


def test_a_topic_a_note_or_an_author_can_be_blocked():
    settings = dataclasses.replace(Settings.load(), blocked_notes=["n0"], blocked_authors=["a1"], blocked_topics=["t2"])
    allowed = allowed_notes(settings, ["n0", "n1", "n2", "n3"], ["a0", "a1", "a2", None], ["t0", "t1", "t2", None])
    assert allowed.tolist() == [False, False, False, True]
