"""One request under way: who asks, at which instant, through which view, and what has been skipped so far."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.trace import Span

from serving.budget import Budget
from serving.hydrate import UserFeatures, hydrate_user, user_depends_on
from serving.outside import with_outside
from serving.telemetry import CANDIDATES, tracer
from serving.world import World
from streaming_sql.online_store import StoreView
from warehouse.features.kinds.values import Value
from warehouse.time_algebra import GRACE_US

NO_DEADLINE = Budget()
LAST_CLICKS = "user_last_clicks_30d"
CLOCK_BEHIND = "clock_behind_the_log"


@dataclass
class Steps:
    """Milliseconds per stage; what was skipped, failed or relaxed; the caches that had an answer."""

    timings_ms: dict[str, float] = field(default_factory=dict)
    degraded: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def timed(self, stage: str, candidates: int | None = None) -> "_Timed":
        """candidates: how many go in, for the stage's span."""
        return _Timed(self, stage, candidates)

    def note_total(self) -> None:
        self.note("total", self.started)

    def note(self, stage: str, started: float) -> None:
        self.timings_ms[stage] = round((time.perf_counter() - started) * 1000, 3)


class _Timed:
    """`Steps.timed`: `contextlib.contextmanager` would make a generator of each stage."""

    def __init__(self, steps: Steps, stage: str, candidates: int | None):
        self._steps, self._stage, self._candidates = steps, stage, candidates

    def __enter__(self) -> Span:
        self._started = time.perf_counter()
        self._span = tracer.start_as_current_span(f"headrace.{self._stage}")
        span = self._span.__enter__()
        if self._candidates is not None:
            span.set_attribute(CANDIDATES, self._candidates)
        return span

    def __exit__(self, *error: Any) -> None:
        try:
            self._span.__exit__(*error)
        finally:
            self._steps.note(self._stage, self._started)


@dataclass(frozen=True)
class Request:
    """The reader as of t, seen through one view: one tick T and one log position K for everything that follows.

    history: note ids, oldest first: what was watched before the log began, then the last clicks. It is what models read.
    """

    world: World
    view: StoreView
    t_us: int
    user_id: str
    feed_type: str
    surface: str | None
    user: UserFeatures
    history: list[str]
    steps: Steps
    budget: Budget = NO_DEADLINE
    geohash: str | None = None


def begin(
    world: World,
    user_id: str,
    feed_type: str = "EXPLORE",
    surface: str | None = None,
    said: Mapping[str, Value] | None = None,
    budget: Budget = NO_DEADLINE,
    geohash: str | None = None,
) -> Request:
    """Fixes t, T and K and reads the reader's own features and the request's. A reader never met is a cold start, not an error.

    said: the features of the request, as `outside.said` gives them. geohash: where it comes from. t never lies before the
    instant at which the view's tick may first be read: a clock that was set back must not empty a feed.
    """
    steps = Steps()
    with steps.timed("hydrate_user"):
        view, degraded = world.view_of(user_id)
        steps.degraded.extend(degraded)
        now_us = world.clock.now_us()
        t_us = max(now_us, view.tick_us + GRACE_US)
        if t_us > now_us:
            steps.degraded.append(CLOCK_BEHIND)
        user = _user(world, view, user_id, t_us, steps)
        history = [*world.readers.history_before_the_log(user_id), *user.sequences.get(LAST_CLICKS, [])]
    if world.kinds.served_inputs:
        with steps.timed("outside"):
            keys = {"user_id": user_id, "surface": surface}
            user = with_outside(user, world.kinds, world.fetcher, keys, said or {}, steps.degraded)
    return Request(world, view, t_us, user_id, feed_type, surface, user, history, steps, budget, geohash)


def _user(world: World, view: StoreView, user_id: str, t_us: int, steps: Steps) -> UserFeatures:
    """The reader's own features, as they were a moment ago where nothing that they hang from has changed."""
    depends_on = user_depends_on(view, world.groups, user_id, t_us, world.tables)
    if depends_on is None:
        return hydrate_user(view, world.groups, user_id, t_us, world.tables)
    user, was_there = world.caches.user.get(
        user_id, depends_on, lambda: (hydrate_user(view, world.groups, user_id, t_us, world.tables), True)
    )
    if was_there:
        steps.cached.append("user")
    return user
