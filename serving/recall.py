"""Which notes may be shown to this reader, which generators suit the feed type, and which rule gives way on a short page."""

from collections.abc import Mapping

import numpy as np

from serving.cache import Same
from serving.caches import Found
from serving.page import showable
from serving.request import Request
from serving.retrieve import Candidates, Retrieval, retrieve

NO_LOCATION = "nearby_without_geohash"
NO_NEARBY_NOTES = "no_nearby_notes"
NO_FOLLOWED_NOTES = "no_followed_notes"
GENERATORS_SKIPPED = "generators_skipped"
SEEN_AGAIN = "seen_filter_relaxed"
RELAXED = (NO_LOCATION, NO_NEARBY_NOTES, NO_FOLLOWED_NOTES, SEEN_AGAIN)
"""Said of candidates that are as good as there are; whatever else is said of them is a reason not to keep them."""
ONLY = {"FOLLOW": ("followed_authors", NO_FOLLOWED_NOTES), "NEARBY": ("nearby", NO_NEARBY_NOTES)}
"""Feed types that one generator answers, and what is said where it finds nothing."""


def find_candidates(request: Request, at_least: int) -> Candidates:
    """The union of the generators, without notes of the future, blocked or hidden ones, and without what the reader has seen.

    Where that leaves fewer than `at_least` notes although there are more, the rule that is least missed gives way (first only
    followed authors or only nearby notes, then only unseen ones) and `degraded` says so.
    """
    limits, degraded = request.world.settings.generators, request.steps.degraded
    if request.feed_type == "NEARBY" and request.geohash is None:
        degraded.append(NO_LOCATION)
    elif request.feed_type in ONLY:
        generator, without = ONLY[request.feed_type]
        with showable(request, _seen(request)) as unseen_N:
            candidates = _found(request, unseen_N, {generator: limits.get(generator, 0)})
        if len(candidates) > 0:
            return candidates
        degraded.append(without)
    return _at_least(request, at_least, limits)


def find_or_recall(request: Request, at_least: int) -> Candidates:
    """`find_candidates`, or what it found a moment ago for the same reader, place and feed type."""
    world, degraded = request.world, request.steps.degraded
    already = len(degraded)

    def find() -> tuple[Found, bool]:
        candidates = find_candidates(request, at_least)
        said = tuple(degraded[already:])
        return Found(candidates, said), all(word in RELAXED for word in said)

    key = (request.user_id, request.feed_type, request.geohash, at_least)
    num_events, of_reader = world.readers.num_events(request.user_id), request.user.values_F.tobytes()
    depends_on = (Same(world.models), request.view.tick_us, num_events, tuple(request.history), of_reader)
    found, was_there = world.caches.candidates.get(key, depends_on, find)
    if was_there:
        request.steps.cached.append("candidates")
        degraded.extend(word for word in found.degraded if word not in degraded)
    return found.candidates


def find_popular(request: Request, at_least: int) -> Candidates:
    """What is trending and fresh, without asking any model; seen notes too where there is too little else."""
    limits = {"trending": 4 * at_least, "fresh": 4 * at_least}
    return _at_least(request, at_least, limits, ranked=False)


def _at_least(request: Request, number: int, limits: Mapping[str, int], ranked: bool = True) -> Candidates:
    """Unseen notes; where they are too few, and there are more, any that may be shown."""
    with showable(request, _seen(request)) as unseen_N:
        candidates = _found(request, unseen_N, limits, ranked)
    if len(candidates) < number:
        with showable(request) as may_N:
            if may_N.sum() > len(candidates):
                request.steps.degraded.append(SEEN_AGAIN)
                candidates = _found(request, may_N, limits, ranked)
    return candidates


def _seen(request: Request) -> list[str]:
    return [*request.world.readers.seen(request.user_id), *request.history]


def _found(request: Request, eligible_N: np.ndarray, limits: Mapping[str, int], ranked: bool = True) -> Candidates:
    """ranked: whether candidates will be, so that time must be left for it."""
    world = request.world
    retrieval = Retrieval(
        catalogue=world.catalogue,
        models=world.models,
        eligible_N=eligible_N,
        trending_rows=world.trending.rows(world, request.view, request.t_us),
        history=request.history,
        user=request.user,
        user_attributes=world.readers.attributes(request.user_id),
        seeds=request.history[-world.settings.item_to_item_seeds :],
        followed_authors=world.readers.follows(request.user_id),
        interests=request.history[-world.settings.topic_seeds :],
        promoted=world.settings.promoted_notes,
        geohash=request.geohash,
    )
    stages = ("hydrate_candidates", "l1", "policy")

    def is_late(num_candidates: int) -> bool:
        return ranked and request.world.pace.expected_ms(stages, num_candidates) > request.budget.left_ms()

    candidates, failed, is_cut = retrieve(retrieval, limits, is_late)
    failed = [*failed, GENERATORS_SKIPPED] if is_cut else failed
    request.steps.degraded.extend(name for name in failed if name not in request.steps.degraded)
    return candidates
