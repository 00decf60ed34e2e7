"""Feeds side by side: one call of a model for all, each answered as it would be alone, and none that pulls another down."""

import asyncio
import contextvars
import dataclasses
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from serving import cascade
from serving.cache import Cache
from serving.company import Asked, Walk, alone, together
from serving.line import Line


class Doubles:
    """Doubles numbers; remembers how many it was asked for each time."""

    def __init__(self):
        self.calls = []

    def __call__(self, numbers):
        self.calls.append(len(numbers))
        if 13 in numbers:
            raise ValueError("13")
        return [2 * number for number in numbers]


def walked(*paths):
    return together([Walk(path, contextvars.copy_context()) for path in paths])


def asks(model, number, times=1):
    for _ in range(times):
        number = (yield Asked(model, number, 1)).scores
    return number


def test_those_who_ask_the_same_model_are_answered_by_one_call():
    first, second = Doubles(), Doubles()

    def both(number):
        once = yield from asks(first, number)
        return (yield from asks(second, once))

    assert [walk.result for walk in walked(both(1), both(2), asks(first, 3), both(4))] == [4, 8, 6, 16]
    assert (first.calls, second.calls) == ([4], [3])
    assert alone(asks(first, 5, times=3)) == 40


def test_one_that_fails_ends_alone():
    model = Doubles()

    def careful(number):
        try:
            return (yield from asks(model, number))
        except ValueError:
            return "was told"

    def fails():
        yield from asks(model, 7)
        raise KeyError("after its answer")

    ended = walked(asks(model, 1), careful(13), fails(), asks(model, 13), asks(model, 3))
    assert [walk.result for walk in ended] == [2, "was told", None, None, 6]
    assert [type(walk.error) for walk in ended] == [type(None), type(None), KeyError, ValueError, type(None)]
    assert model.calls == [5, 1, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="2 requests for 1"):
        alone(asks(lambda numbers: [1, 2], 1))


def test_what_one_makes_the_others_wait_for_whichever_thread_makes_it():
    cache, model, theirs = Cache(10, 60), Doubles(), Future()

    def made():
        return (yield from asks(model, 4)), True

    def waits():
        yield theirs
        return theirs.result()

    threading.Timer(0.05, theirs.set_result, ["of another thread"]).start()
    paths = [cache.path("key", 0, made) for _ in range(3)]
    assert [walk.result for walk in walked(waits(), *paths)] == ["of another thread", (8, False), (8, True), (8, True)]
    assert model.calls == [1]
    assert (cache.num_misses, cache.num_shared) == (1, 2)


def test_contexts_are_kept_apart():
    who = contextvars.ContextVar("who", default="nobody")
    model = Doubles()

    def path(name):
        who.set(name)
        yield from asks(model, 1)
        return who.get()

    assert [walk.result for walk in walked(path("a"), path("b"))] == ["a", "b"]
    assert who.get() == "nobody"


def test_those_that_wait_in_line_go_together_and_a_client_that_left_does_not():
    sizes, model, at_most = [], Doubles(), 3

    async def run():
        with ThreadPoolExecutor(1) as threads:
            line, may_go = Line(threads, 1, at_most, sizes.append), threading.Event()
            threads.submit(may_go.wait, 10)
            tasks = [asyncio.ensure_future(line.computed(lambda company, n=n: asks(model, n))) for n in (1, 2, 13, 4, 5, 6)]
            await asyncio.sleep(0)
            tasks[1].cancel()
            await asyncio.sleep(0)
            may_go.set()
            return await asyncio.gather(*tasks, return_exceptions=True)

    told = asyncio.run(run())
    assert [type(one).__name__ if isinstance(one, BaseException) else one for one in told] == [
        2, "CancelledError", "ValueError", 8, 10, 12,
    ]  # fmt: skip
    assert sizes == [2, 3]


def test_two_threads_part_the_line_between_them():
    sizes, both_are_there = [], threading.Barrier(2)

    def path(number):
        both_are_there.wait(10)
        yield from asks(Doubles(), number)

    async def run():
        with ThreadPoolExecutor(2) as threads:
            line, may_go = Line(threads, 2, 4, sizes.append), threading.Event()
            for _ in range(2):
                threads.submit(may_go.wait, 10)
            tasks = [asyncio.ensure_future(line.computed(lambda company: path(1))) for _ in range(2)]
            await asyncio.sleep(0)
            may_go.set()
            await asyncio.gather(*tasks)

    asyncio.run(run())
    assert sizes == [1, 1]


def test_a_page_is_the_same_alone_and_in_company(server, readers):
    world = server.engine.world
    uncached = dataclasses.replace(world, caches=type(world.caches)(dataclasses.replace(world.settings, cached_readers=0)))
    some = [*readers[4:9], "never met"]
    by_itself = [cascade.feed(uncached, reader, "EXPLORE", 20) for reader in some]
    beside = walked(*(cascade.feed_path(uncached, reader, "EXPLORE", 20) for reader in some))
    for one, walk in zip(by_itself, beside, strict=True):
        assert walk.error is None
        other = walk.result
        assert other.candidates.row_C.tolist() == one.candidates.row_C.tolist()
        np.testing.assert_allclose(other.l1_score_C, one.l1_score_C, atol=2e-6)
        np.testing.assert_allclose(other.final_score_C, one.final_score_C, atol=2e-6)
        assert other.steps.degraded == one.steps.degraded


def test_feeds_over_http_that_wait_are_computed_side_by_side(server, readers):
    def together_so_far():
        lines = server.get("/metrics").text.splitlines()
        told = {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if line.startswith("headrace_side_by_side")}
        return told["headrace_side_by_side_feeds_sum"], told["headrace_side_by_side_feeds_count"]

    feeds, turns = together_so_far()
    may_go = threading.Event()
    for _ in range(server.engine.settings.inference_threads):
        server.app.state.workers.submit(may_go.wait, 10)
    with ThreadPoolExecutor(6) as clients:
        answers = [clients.submit(server.feed, reader) for reader in readers[10:16]]
        while len(server.app.state.line) < 6:
            assert not any(answer.done() for answer in answers)
        may_go.set()
        pages = [answer.result()["notes"] for answer in answers]
    assert [len(page) for page in pages] == 6 * [20]
    now = together_so_far()
    assert now[0] - feeds == 6
    assert now[1] - turns <= 3
