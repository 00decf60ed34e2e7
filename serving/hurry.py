"""What a request leaves out when its time is short, in this order: generators, candidates, L2, and at last the whole cascade,
whose place the reader's last page takes, or what is trending. Each is said in `degraded`.

Shape letters: C candidates.
"""

import numpy as np

from serving.hydrate import CandidateFeatures
from serving.page import lay_out
from serving.policy import Placed
from serving.recall import find_popular
from serving.request import Request
from serving.retrieve import Candidates
from serving.served import Served, new_request_id

CANDIDATES_CUT = "candidates_cut"
L2_SKIPPED = "l2_skipped"
CACHED_PAGE = "cached_page"
TRENDING_PAGE = "trending_page"
_WITHOUT_L2 = ("hydrate_candidates", "l1", "policy")


def affordable(request: Request, candidates: Candidates, page_size: int) -> Candidates:
    """The best candidates of recall that can be ranked in time; never fewer than two pages of them."""
    most = request.world.pace.most_candidates(_WITHOUT_L2, request.budget.left_ms())
    if most is None or most >= len(candidates):
        return candidates
    kept = max(most, 2 * page_size)
    if kept >= len(candidates):
        return candidates
    request.steps.degraded.append(CANDIDATES_CUT)
    return candidates.take(np.arange(kept))


def has_time_for_l2(request: Request, num_candidates: int) -> bool:
    """Whether L2 and the policy can still be done in time."""
    pace = request.world.pace
    if pace.expected_ms(("l2", "policy"), num_candidates) <= request.budget.left_ms():
        return True
    pace.skipped("l2")
    request.steps.degraded.append(L2_SKIPPED)
    return False


def page_without_ranking(request: Request, page_size: int) -> Served | None:
    """The reader's last page or a page of what is trending, if there is no time to rank even a few candidates; else None."""
    pace = request.world.pace
    if request.budget.left_ms() > pace.expected_ms(_WITHOUT_L2, 1):
        return None
    for stage in _WITHOUT_L2:
        pace.skipped(stage)
    last = request.world.last_pages.get(request.user_id, request.feed_type, request.t_us)
    if last is not None and len(last.page) >= page_size:
        request.steps.degraded.append(CACHED_PAGE)
        return _again(request, last, page_size)
    request.steps.degraded.append(TRENDING_PAGE)
    candidates = find_popular(request, page_size)
    score_C = candidates.recall_score_C
    request_id = new_request_id()
    page = lay_out(request, candidates, np.arange(len(candidates)), score_C, page_size, request_id)
    return _served(request, request_id, candidates, page, score_C, np.full(len(candidates), np.nan), {})


def _again(request: Request, last: Served, page_size: int) -> Served:
    """The last page as it was, under an id of its own: what is shown again is another impression."""
    shown = np.array([placed.candidate for placed in last.page[:page_size]], dtype=np.int64)
    page = [Placed(place, placed.slot, placed.propensity) for place, placed in enumerate(last.page[:page_size])]
    predictions = {head: scores_C[shown] for head, scores_C in last.predictions.items()}
    return _served(
        request,
        new_request_id(),
        last.candidates.take(shown),
        page,
        last.final_score_C[shown],
        last.l1_score_C[shown],
        predictions,
    )


def _served(
    request: Request,
    request_id: str,
    candidates: Candidates,
    page: list[Placed],
    final_score_C: np.ndarray,
    l1_score_C: np.ndarray,
    predictions: dict[str, np.ndarray],
) -> Served:
    """No features of candidates: none were read."""
    request.steps.note_total()
    return Served.of(
        request,
        request_id,
        candidates=candidates,
        l1_score_C=l1_score_C,
        predictions=predictions,
        final_score_C=final_score_C,
        page=page,
        logged=np.empty(0, dtype=np.int64),
        logged_features=CandidateFeatures((), np.empty((0, 0))),
    )
