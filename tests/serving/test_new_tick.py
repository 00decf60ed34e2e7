"""A new tick is read once what hangs from it is ready, and at once by a reader whose events it alone knows."""

import dataclasses

import numpy as np
import pytest

from serving import cascade
from serving import world as world_of_server
from serving.request import begin
from streaming_sql.assembled import Assembled
from warehouse.time_algebra import FIVE_MINUTES_US, GRACE_US


@pytest.fixture
def next_tick(server, clock):
    def move():
        clock.advance_us(FIVE_MINUTES_US + GRACE_US)
        server.wait_for_tick()

    return move


@pytest.fixture
def behind(server, next_tick):
    """The server's world at a new tick, as it is while only the tick before is assembled."""
    next_tick()
    world = server.engine.world
    assembled = Assembled(world.store.plans, {})
    assembled.assemble(world.store.before().view)
    return dataclasses.replace(world, assembled=assembled)


def test_until_a_tick_is_assembled_requests_read_what_the_tick_before_read_last(behind):
    before, newest = behind.store.before().view, behind.store.view()
    assert before.tick_us < newest.tick_us
    assert behind.view_of("somebody")[0] is before
    behind.assembled.assemble(newest)
    assert behind.view_of("somebody")[0].tick_us == newest.tick_us


def test_a_reader_with_a_newer_event_reads_the_new_tick_at_once(server, behind):
    server.post(
        "/v1/events", {"events": [{"eventId": "new-tick-1", "eventType": "click", "userId": "new-tick", "noteId": "n1"}]}
    )
    assert behind.view_of("new-tick")[0].tick_us == behind.store.tick_us
    assert behind.view_of("somebody")[0] is behind.store.before().view


def test_a_tick_that_takes_too_long_is_read_all_the_same(behind, monkeypatch):
    monkeypatch.setattr(world_of_server, "_ASSEMBLED_WITHIN_S", -1.0)
    assert behind.view_of("somebody")[0].tick_us == behind.store.tick_us


def test_what_an_event_changes_for_every_reader_is_not_waited_for(behind):
    plans = behind.store.plans
    fresh = next(plan for plan in plans.values() if plan.fresh)
    of_notes = dataclasses.replace(fresh, group=plans["note_engagement"].group)
    store = _OfPlans(behind.store, {**plans, "note_engagement": of_notes})
    assert dataclasses.replace(behind, store=store).view_of("somebody")[0].tick_us == store.tick_us


class _OfPlans:
    def __init__(self, store, plans):
        self._store, self.plans = store, plans

    def __getattr__(self, name):
        return getattr(self._store, name)


def test_what_rankers_keep_of_notes_is_ready_with_the_tick(server, next_tick):
    world, rows = server.engine.world, np.arange(300)

    def scores():
        request = begin(world, "ranked")
        l1, l2, features = world.models.l1, world.models.l2, cascade.hydrate(request, rows)
        of_l2 = l2.score(
            request.user.pick(l2.user_features), [], [], features, rows=rows, codes=world.models.codes_of_rows[rows]
        )
        return [l1.score(request.user.pick(l1.user_features), features, rows=rows), *of_l2.values()]

    scores()
    clicks = [
        {"eventId": f"ready-{note}", "eventType": "click", "userId": "clicker", "noteId": world.catalogue.note_ids[note]}
        for note in range(0, 300, 3)
    ]
    server.post("/v1/events", {"events": clicks})
    next_tick()
    memos = world.models.memos()
    missed = {name: memo.num_misses for name, memo in memos.items()}
    kept = scores()
    assert {name: memo.num_misses for name, memo in memos.items()} == missed
    for memo in memos.values():
        memo.forget()
    for own, made in zip(kept, scores(), strict=True):
        assert np.array_equal(own, made)


def test_a_preparation_that_fails_leaves_the_tick_to_requests(server, caplog):
    world = server.engine.world

    def failing(view, assembled):
        raise RuntimeError("no memory")

    assembled = Assembled(world.store.plans, {("note_id",): [("n1",)]})
    assembled._prepare = failing
    assembled.assemble(world.store.view())
    assert assembled.holds(world.store.view())
    assert "a tick is used unprepared" in caplog.text
