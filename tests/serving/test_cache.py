"""What is kept for a reader is given out only while nothing that it hangs from has changed, and then it is what would be made
anew."""

import threading

import numpy as np
import pytest

from serving.cache import Cache, Same
from serving.hydrate import hydrate_user, user_depends_on


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def kept(value):
    return lambda: (value, True)


def must_not_be_made():
    raise AssertionError("it was there")


def test_a_value_is_made_once_and_then_given_out():
    cache = Cache(10, 60)
    assert cache.get("u1", "tick 1", kept("a")) == ("a", False)
    assert cache.get("u1", "tick 1", must_not_be_made) == ("a", True)
    assert (cache.num_hits, cache.num_misses, len(cache)) == (1, 1, 1)


def test_an_entry_never_outlives_what_it_depends_on_nor_its_time():
    clock = Clock()
    cache = Cache(10, 60, clock)
    cache.get("u1", "tick 1", kept("a"))
    assert cache.get("u1", "tick 2", kept("b")) == ("b", False)
    assert cache.get("u1", "tick 1", kept("c")) == ("c", False)  # one entry a key: the newest
    clock.now = 59.0
    assert cache.get("u1", "tick 1", must_not_be_made) == ("c", True)
    clock.now = 60.0
    assert cache.get("u1", "tick 1", kept("d")) == ("d", False)


def test_it_is_bounded_and_forgets_what_was_asked_for_longest_ago():
    cache = Cache(2, 60)
    for user_id in ("u1", "u2", "u1", "u3"):
        cache.get(user_id, 0, kept(user_id))
    assert len(cache) == 2
    assert cache.get("u1", 0, must_not_be_made) == ("u1", True)
    assert cache.get("u2", 0, kept("anew")) == ("anew", False)


@pytest.mark.parametrize(("size", "seconds"), [(0, 60), (10, 0)])
def test_none_of_it_keeps_nothing(size, seconds):
    cache = Cache(size, seconds)
    cache.get("u1", 0, kept("a"))
    assert cache.get("u1", 0, kept("b")) == ("b", False)


def test_what_is_not_to_be_kept_and_what_fails_is_made_again():
    cache = Cache(10, 60)
    assert cache.get("u1", 0, lambda: ("cut short", False)) == ("cut short", False)
    with pytest.raises(ZeroDivisionError):
        cache.get("u1", 0, lambda: (1 // 0, True))
    assert cache.get("u1", 0, kept("whole")) == ("whole", False)


@pytest.mark.parametrize("made", [("the same", True), ("mine", False), None])
def test_many_who_ask_at_once_wait_for_one_making(made):
    cache, started, may_end = Cache(10, 60), threading.Event(), threading.Event()
    answers, made_by = [], []

    def slow():
        started.set()
        assert may_end.wait(10)
        if made is None:
            raise OSError("the store is gone")
        return made

    def first():
        try:
            answers.append(cache.get("u1", 0, slow))
        except OSError:
            answers.append(None)

    def other(number):
        answers.append(cache.get("u1", 0, lambda: (made_by.append(number) or "own", True)))

    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert started.wait(10)
    threads += [threading.Thread(target=other, args=(number,)) for number in range(4)]
    for thread in threads[1:]:
        thread.start()
    may_end.set()
    for thread in threads:
        thread.join(10)
    if made == ("the same", True):
        assert made_by == []
        assert sorted(answers) == [("the same", False)] + 4 * [("the same", True)]
        assert cache.num_shared + cache.num_hits == 4
    else:
        assert made_by  # they made their own
        assert len(answers) == 5


def test_same_is_equal_to_itself_alone():
    first, second = [1], [1]
    assert Same(first) == Same(first)
    assert Same(first) != Same(second)
    assert len({Same(first), Same(first), Same(second)}) == 2


def test_a_second_feed_comes_from_the_caches_and_is_the_same_page(server, readers):
    first, second = (server.feed(readers[20], limit=9) for _ in range(2))
    assert (first["cached"], second["cached"]) == ([], ["user", "candidates", "l1"])
    assert [note["noteId"] for note in first["notes"]] == [note["noteId"] for note in second["notes"]]
    assert [note["l1Score"] for note in first["notes"]] == [note["l1Score"] for note in second["notes"]]
    assert server.feed(readers[20], limit=5)["cached"] == ["user"]  # another page size is another question
    assert server.feed(readers[20], limit=9, feedType="FOLLOW")["cached"] == ["user"]


def test_features_logged_from_the_caches_are_those_of_the_request(server, readers):
    for _ in range(2):
        request_id = server.feed(readers[21])["requestId"]
    served, world = server.engine.recent.get(request_id), server.engine.world
    assert "l1" in served.steps.cached
    anew = hydrate_user(world.store.view(), world.groups, readers[21], served.t_us, world.tables)
    np.testing.assert_array_equal(served.user.values_F, anew.values_F)
    shown = [placed.candidate for placed in served.page]
    assert set(shown) <= set(served.logged.tolist())
    note_id = served.candidates.note_ids[shown[0]]
    told = server.explain(request_id, note_id)["candidates"][0]["features"]
    view = world.store.view()
    for name, group in world.groups.items():
        if group.entity_keys == ("note_id",):
            matrix = view.assemble(name, [(note_id,)], served.t_us)
            wanted = [None if np.isnan(value) else value for value in matrix.values[0]]
            assert [told[feature] for feature in matrix.names] == wanted


def test_a_readers_own_event_drops_what_is_kept_for_that_reader_alone(server, readers, clock):
    mine, other = readers[22], readers[23]
    page, _ = (server.feed(user_id) for user_id in (mine, other))
    clicked = page["notes"][0]["noteId"]
    event = {"eventId": "cache-click", "eventType": "click", "userId": mine, "noteId": clicked}
    assert server.post("/v1/events", event).status_code == 202
    clock.advance_us(1)
    after = server.feed(mine)
    assert "candidates" not in after["cached"]
    assert "user" not in after["cached"]
    assert clicked not in [note["noteId"] for note in after["notes"]]
    assert server.feed(other)["cached"] == ["user", "candidates", "l1"]


def test_what_user_features_depend_on_changes_with_five_minutes_and_events(server, readers):
    world, view = server.engine.world, server.engine.world.store.view()
    t_us = view.tick_us + 400_000_000

    def depends_on(t_us):
        return user_depends_on(view, world.groups, readers[24], t_us, world.tables)

    assert depends_on(t_us) == depends_on(t_us + 1)
    assert depends_on(t_us) != depends_on(t_us + 300_000_000)


def test_hits_are_counted_where_one_looks(server, readers):
    for _ in range(2):
        server.feed(readers[25])
    told = server.get("/metrics").text
    assert 'headrace_cache_answers{cache="candidates",result="hits"}' in told
    caches = server.get("/v1/status").json()["caches"]
    assert set(caches) == {"candidates", "l1", "user", "l1_notes", "l2_notes"}
    assert 'headrace_cache_answers{cache="l2_notes",result="misses"}' in told
    assert all(one["hits"] > 0 and one["misses"] > 0 and one["entries"] > 0 for one in caches.values())
