"""The path of a request, top to bottom: retrieve, hydrate, L1, L2, policy.

Shape letters: C candidates in order of recall, S survivors of L1, F features. Nothing here waits for a disk or a network.
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from opentelemetry.trace import get_current_span

from serving.budget import Budget
from serving.hurry import L2_SKIPPED, RANKING, affordable, has_time_for_l2, page_without_ranking
from serving.hydrate import CandidateFeatures, hydrate_candidates
from serving.page import lay_out, reserve
from serving.rank import as_given, best_first, run_l1, run_l2, score_so_far
from serving.recall import find_candidates
from serving.request import NO_DEADLINE, Request, begin
from serving.retrieve import Candidates
from serving.served import Served, new_request_id
from serving.telemetry import CANDIDATES, DEGRADED, REQUEST_ID, tracer
from serving.world import World
from warehouse.features.kinds.values import Value

Said = Mapping[str, Value] | None
"""The features of the request, as `outside.said` gives them."""


@tracer.start_as_current_span("headrace.feed")
def feed(
    world: World,
    user_id: str,
    feed_type: str,
    page_size: int,
    surface: str | None = None,
    said: Said = None,
    budget: Budget = NO_DEADLINE,
    geohash: str | None = None,
) -> Served:
    """A page of notes for one reader: the whole path. What the budget has no time for is left out (`serving.hurry`)."""
    settings, pace = world.settings, world.pace
    request = begin(world, user_id, feed_type, surface, said, budget, geohash)
    steps = request.steps
    if (in_a_hurry := page_without_ranking(request, page_size)) is not None:
        return in_a_hurry

    with steps.timed("retrieve") as span:
        candidates = affordable(request, find_candidates(request, page_size), page_size)
        span.set_attribute(CANDIDATES, len(candidates))
    with steps.timed("hydrate_candidates", len(candidates)):
        features_CF = _hydrate(request, candidates.note_ids, candidates.author_ids)
    with steps.timed("l1", len(candidates)):
        l1_score_C, l1_order_C = run_l1(request, features_CF, candidates.recall_score_C, len(candidates))
        survivors_S = reserve(request, candidates, l1_order_C, settings.l1_top_k)
    with steps.timed("l2", len(survivors_S)):
        note_ids_S = [candidates.note_ids[candidate] for candidate in survivors_S]
        if has_time_for_l2(request, len(note_ids_S)):
            predictions_S, final_score_S = run_l2(request, note_ids_S, features_CF.take(survivors_S), l1_score_C[survivors_S])
        else:
            predictions_S, final_score_S = {}, score_so_far(l1_score_C[survivors_S])
    final_score_C = _spread(final_score_S, survivors_S, len(candidates))
    request_id = new_request_id()
    with steps.timed("policy", len(survivors_S)):
        order_C = survivors_S[best_first(final_score_S, len(survivors_S))]
        page = lay_out(request, candidates, order_C, final_score_C, page_size, request_id)

    is_logged_C = _sampled(request_id, len(candidates), settings.logged_share)
    is_logged_C[[placed.candidate for placed in page]] = True
    logged = np.flatnonzero(is_logged_C)
    steps.note_total()
    get_current_span().set_attributes({REQUEST_ID: request_id, CANDIDATES: len(candidates), DEGRADED: steps.degraded})
    for stage in RANKING:
        if not (stage == "l2" and L2_SKIPPED in steps.degraded):
            pace.note(stage, steps.timings_ms[stage], len(survivors_S) if stage in ("l2", "policy") else len(candidates))
    return Served.of(
        request,
        request_id,
        candidates=candidates,
        l1_score_C=l1_score_C,
        predictions={head: _spread(scores_S, survivors_S, len(candidates)) for head, scores_S in predictions_S.items()},
        final_score_C=final_score_C,
        page=page,
        logged=logged,
        logged_features=features_CF.take(logged),
    )


def retrieve_alone(
    world: World, user_id: str, feed_type: str, limit: int, geohash: str | None = None
) -> tuple[Candidates, list[str]]:
    """The first stage alone: at most `limit` candidates, and what was degraded."""
    request = begin(world, user_id, feed_type, geohash=geohash)
    candidates = find_candidates(request, 1)
    return candidates.take(np.arange(min(limit, len(candidates)))), request.steps.degraded


def rank_l1_alone(
    world: World, user_id: str, note_ids: Sequence[str], top_k: int, surface: str | None = None, said: Said = None
) -> tuple[list[str | None], np.ndarray, np.ndarray, list[str]]:
    """(authors [C], l1 scores [C], positions of the top_k best first, what was degraded) for candidates given from outside."""
    request = begin(world, user_id, surface=surface, said=said)
    author_ids = [world.catalogue.author_of(note_id) for note_id in note_ids]
    features_CF = _hydrate(request, note_ids, author_ids)
    scores_C, order = run_l1(request, features_CF, as_given(len(note_ids)), top_k)
    return author_ids, scores_C, order, request.steps.degraded


def rank_l2_alone(
    world: World, user_id: str, note_ids: Sequence[str], top_k: int, surface: str | None = None, said: Said = None
) -> tuple[list[str | None], dict[str, np.ndarray], np.ndarray, np.ndarray, list[str]]:
    """(authors [C], probabilities per head, final scores [C], positions of the top_k best first, what was degraded)."""
    request = begin(world, user_id, surface=surface, said=said)
    author_ids = [world.catalogue.author_of(note_id) for note_id in note_ids]
    features_CF = _hydrate(request, note_ids, author_ids)
    predictions, scores_C = run_l2(request, note_ids, features_CF, as_given(len(note_ids)))
    return author_ids, predictions, scores_C, best_first(scores_C, top_k), request.steps.degraded


def _hydrate(request: Request, note_ids: Sequence[str], author_ids: Sequence[str | None]) -> CandidateFeatures:
    world = request.world
    return hydrate_candidates(
        request.view,
        world.groups,
        world.catalogue,
        request.user_id,
        note_ids,
        author_ids,
        request.t_us,
        world.tables,
        world.assembled,
    )


def _sampled(request_id: str, num_candidates: int, share: float) -> np.ndarray:
    """bool [C]: the candidates whose features are logged although they are not shown; the same for the same request."""
    draws = [zlib.crc32(f"{request_id}:{candidate}".encode()) for candidate in range(num_candidates)]
    return np.array(draws, dtype=np.float64) < share * 2**32


def _spread(values_S: np.ndarray, survivors_S: np.ndarray, num_candidates: int) -> np.ndarray:
    """float64 [C]: the survivors' values at their places, NaN elsewhere."""
    values_C = np.full(num_candidates, np.nan)
    values_C[survivors_S] = values_S
    return values_C
