"""Which notes may be shown to this reader, which generators suit the feed type, and which rule gives way on a short page."""

from collections.abc import Mapping

import numpy as np

from serving.page import showable
from serving.request import Request
from serving.retrieve import Candidates, Retrieval, retrieve

NO_LOCATIONS = "nearby_without_locations"
NO_FOLLOWED_NOTES = "no_followed_notes"
SEEN_AGAIN = "seen_filter_relaxed"


def find_candidates(request: Request, at_least: int) -> Candidates:
    """The union of the generators, without notes of the future, blocked or hidden ones, and without what the reader has seen.

    Where that leaves fewer than `at_least` notes although there are more, the rule that is least missed gives way (first only
    followed authors, then only unseen notes) and `degraded` says so.
    """
    limits, degraded = request.world.settings.generators, request.steps.degraded
    may_N = showable(request)
    unseen_N = _without_seen(request, may_N)
    if request.feed_type == "NEARBY":
        degraded.append(NO_LOCATIONS)
    if request.feed_type == "FOLLOW":
        candidates = _found(request, unseen_N, {"followed_authors": limits.get("followed_authors", 0)})
        if len(candidates) > 0:
            return candidates
        degraded.append(NO_FOLLOWED_NOTES)
    candidates = _found(request, unseen_N, limits)
    if len(candidates) < at_least and may_N.sum() > len(candidates):
        degraded.append(SEEN_AGAIN)
        candidates = _found(request, may_N, limits)
    return candidates


def _without_seen(request: Request, may_N: np.ndarray) -> np.ndarray:
    row_of, unseen_N = request.world.catalogue.row_of, may_N.copy()
    seen = [*request.world.readers.seen(request.user_id), *request.history]
    unseen_N[[row_of[note_id] for note_id in seen if note_id in row_of]] = False
    return unseen_N


def _found(request: Request, eligible_N: np.ndarray, limits: Mapping[str, int]) -> Candidates:
    world = request.world
    retrieval = Retrieval(
        catalogue=world.catalogue,
        models=world.models,
        eligible_N=eligible_N,
        trending_rows=world.trending.rows(world, request.view, request.t_us),
        history=request.history,
        seeds=request.history[-world.settings.item_to_item_seeds :],
        followed_authors=world.readers.follows(request.user_id),
        promoted=world.settings.promoted_notes,
    )
    candidates, failed = retrieve(retrieval, limits)
    request.steps.degraded.extend(name for name in failed if name not in request.steps.degraded)
    return candidates
