"""Requests side by side on one thread, so that one call of a model answers all that ask it at that moment.

A path is a generator, read top to bottom like the function that it would be. Where it needs a model it yields what it asks
(`Asked`) and is sent the answer; where another request makes what it needs it yields the future of that, and is sent nothing.
A path that fails ends alone. Knows nothing of what is asked.
"""

import contextvars
import logging
import time
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Asked:
    """score_many: takes the requests of all that ask it, gives the scores of each. size: of the request, as `Answer` counts."""

    score_many: Callable[[list[Any]], Sequence[Any]]
    request: Any
    size: int


@dataclass(frozen=True)
class Answer:
    """The scores of one request. took_ms: of the call, for requests of that size together."""

    scores: Any
    took_ms: float
    size: int


Path = Generator["Asked | Future[Any]", Any, Result]


def alone(path: Path[Result]) -> Result:
    """The path's result, on its own. Raises what it raises."""
    outcome = together([Walk(path, contextvars.copy_context())])[0]
    if outcome.error is not None:
        raise outcome.error
    return outcome.result


def _nothing(_: "Walk[Any]") -> None:
    pass


@dataclass
class Walk(Generic[Result]):
    """A path under way, in a context of its own; `result` or `error` once it has ended, of which `then` is told at once."""

    path: Path[Result]
    context: contextvars.Context
    then: "Callable[[Walk[Result]], None]" = _nothing
    error: BaseException | None = None
    result: Any = None
    has_ended: bool = False
    waits_for: "Asked | Future[Any] | None" = None

    def go_on(self, answer: Any = None, failure: Exception | None = None) -> None:
        """As far as the next question."""
        try:
            if failure is None:
                self.waits_for = self.context.run(self.path.send, answer)
            else:
                self.waits_for = self.context.run(self.path.throw, failure)
            return
        except StopIteration as end:
            self.result = end.value
        except BaseException as error:
            self.error = error
        self.has_ended, self.waits_for = True, None
        self.then(self)


def together(walks: Sequence[Walk[Result]]) -> Sequence[Walk[Result]]:
    """Takes all to their end. Those who ask the same model at a time get one call, once nobody can go on without an answer."""
    for walk in walks:
        walk.go_on()
    while any(not walk.has_ended for walk in walks):
        futures = [(walk, walk.waits_for) for walk in walks if isinstance(walk.waits_for, Future)]
        made = [walk for walk, future in futures if future.done()]
        for walk in made:
            walk.go_on()
        if made:
            continue
        asking: dict[Hashable, list[tuple[Walk[Result], Asked]]] = {}
        for walk in walks:
            if isinstance(walk.waits_for, Asked):
                asking.setdefault(walk.waits_for.score_many, []).append((walk, walk.waits_for))
        for of_one_model in asking.values():
            _answer(of_one_model)
        if not asking:
            wait([future for _, future in futures], return_when=FIRST_COMPLETED)  # other threads make what these wait for
    return walks


def _answer(asking: Sequence[tuple[Walk[Any], Asked]]) -> None:
    """asking: of one model."""
    started = time.perf_counter()
    try:
        scores = asking[0][1].score_many([asked.request for _, asked in asking])
        if len(scores) != len(asking):
            raise ValueError(f"a model gave scores of {len(scores)} requests for {len(asking)}")
    except Exception as error:
        if len(asking) == 1:
            asking[0][0].go_on(failure=error)
            return
        log.warning("a model failed for %d requests together, each asks alone: %s", len(asking), error)
        for one in asking:
            _answer([one])
        return
    took_ms, size = (time.perf_counter() - started) * 1000, sum(asked.size for _, asked in asking)
    for (walk, _), of_walk in zip(asking, scores, strict=True):
        walk.go_on(Answer(of_walk, took_ms, size))
