"""The path of a request, top to bottom: retrieve, hydrate, L1, L2, policy.

Shape letters: C candidates in order of recall, S survivors of L1, F features. Nothing here waits for a disk or a network. Where
a model is asked the path stops (`yield from`), so that requests side by side ask it together (`serving.company`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from opentelemetry.trace import get_current_span

from serving.budget import Budget
from serving.cache import Same
from serving.caches import Scored
from serving.company import Path, alone
from serving.hurry import affordable, has_time_for_l2, page_without_ranking
from serving.hydrate import Hydrated, hydrate_candidates
from serving.page import lay_out, reserve
from serving.rank import as_given, best_first, run_l1, run_l2, score_so_far
from serving.recall import find_candidates, find_or_recall
from serving.request import NO_DEADLINE, Request, begin
from serving.retrieve import Candidates
from serving.served import Served, new_request_id
from serving.telemetry import CANDIDATES, DEGRADED, REQUEST_ID, spanned
from serving.world import World
from warehouse.compiled import compiled
from warehouse.features.kinds.values import Value

Said = Mapping[str, Value] | None
"""The features of the request, as `outside.said` gives them."""


@spanned("headrace.feed")
def feed_path(
    world: World,
    user_id: str,
    feed_type: str,
    page_size: int,
    surface: str | None = None,
    said: Said = None,
    budget: Budget = NO_DEADLINE,
    geohash: str | None = None,
) -> Path[Served]:
    """A page of notes for one reader: the whole path. What the budget has no time for is left out (`serving.hurry`)."""
    settings, pace = world.settings, world.pace
    request = begin(world, user_id, feed_type, surface, said, budget, geohash)
    steps = request.steps
    if (in_a_hurry := page_without_ranking(request, page_size)) is not None:
        return in_a_hurry

    with steps.timed("retrieve") as span:
        candidates = affordable(request, find_or_recall(request, page_size), page_size)
        span.set_attribute(CANDIDATES, len(candidates))
    l1_score_C, features = yield from _score_with_l1(request, candidates)
    l1_order_C = best_first(candidates.recall_score_C if np.isnan(l1_score_C).all() else l1_score_C, len(candidates))
    survivors_S = reserve(request, candidates, l1_order_C, settings.l1_top_k)
    request_id = new_request_id()
    sampled = _sampled(request_id, len(candidates), settings.logged_share)
    is_l1_new = features is not None
    if features is None:
        needed = np.union1d(survivors_S, sampled)
        with steps.timed("hydrate_candidates", len(needed)):
            features = _Some.of(request, candidates, needed)
    with steps.timed("l2", len(survivors_S)):
        if has_time_for_l2(request, len(survivors_S)):
            predictions_S, final_score_S = yield from run_l2(request, features.at(survivors_S), l1_score_C[survivors_S])
        else:
            predictions_S, final_score_S = {}, score_so_far(l1_score_C[survivors_S])
    final_score_C = _spread(final_score_S, survivors_S, len(candidates))
    with steps.timed("policy", len(survivors_S)):
        order_C = survivors_S[best_first(final_score_S, len(survivors_S))]
        page = lay_out(request, candidates, order_C, final_score_C, page_size, request_id)
    logged = np.union1d(sampled, np.array([placed.candidate for placed in page], dtype=np.int64))
    steps.note_total()
    get_current_span().set_attributes({REQUEST_ID: request_id, CANDIDATES: len(candidates), DEGRADED: steps.degraded})
    if is_l1_new:
        pace.note("hydrate_candidates", steps.timings_ms["hydrate_candidates"], len(candidates))
    pace.note("policy", steps.timings_ms["policy"], len(survivors_S))
    return Served.of(
        request,
        request_id,
        candidates=candidates,
        l1_score_C=l1_score_C,
        predictions=_spread_all(predictions_S, survivors_S, len(candidates)),
        final_score_C=final_score_C,
        page=page,
        logged=logged,
        logged_features=features.at(logged).copied(),
    )


def feed(world: World, user_id: str, feed_type: str, page_size: int) -> Served:
    """A page of notes, with no other request beside it and all the time it takes."""
    return alone(feed_path(world, user_id, feed_type, page_size))


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
    features_C = hydrate(request, world.catalogue.rows(note_ids), note_ids)
    scores_C = alone(run_l1(request, features_C))
    return author_ids, scores_C, best_first(score_so_far(scores_C), top_k), request.steps.degraded


def rank_l2_alone(
    world: World, user_id: str, note_ids: Sequence[str], top_k: int, surface: str | None = None, said: Said = None
) -> tuple[list[str | None], dict[str, np.ndarray], np.ndarray, np.ndarray, list[str]]:
    """(authors [C], probabilities per head, final scores [C], positions of the top_k best first, what was degraded)."""
    request = begin(world, user_id, surface=surface, said=said)
    author_ids = [world.catalogue.author_of(note_id) for note_id in note_ids]
    features_C = hydrate(request, world.catalogue.rows(note_ids), note_ids)
    predictions, scores_C = alone(run_l2(request, features_C, as_given(len(note_ids)), note_ids))
    return author_ids, predictions, scores_C, best_first(scores_C, top_k), request.steps.degraded


@dataclass(frozen=True)
class _Some:
    """Features of some candidates: those at `places`, ascending."""

    places: np.ndarray
    features: Hydrated

    @classmethod
    def of(cls, request: Request, candidates: Candidates, places: np.ndarray) -> "_Some":
        return cls(places, hydrate(request, candidates.row_C[places]))

    def at(self, candidates: np.ndarray) -> Hydrated:
        """Of these candidates, in this order; all of them must be among the places."""
        return self.features.take(np.searchsorted(self.places, candidates))


def _score_with_l1(request: Request, candidates: Candidates) -> Path[tuple[np.ndarray, _Some | None]]:
    """(L1's scores float64 [C], NaN if it failed; the features of all candidates, None where the scores were known already).

    Scores are kept for as long as the candidates and all that L1 reads of the reader are the same; within that time only the
    age of notes and what the request says of itself move.
    """
    world, steps, made = request.world, request.steps, None

    def make() -> Path[tuple[Scored, bool]]:
        nonlocal made
        with steps.timed("hydrate_candidates", len(candidates)):
            made = _Some.of(request, candidates, np.arange(len(candidates)))
        with steps.timed("l1", len(candidates)):
            l1_score_C = yield from run_l1(request, made.features)
        return Scored(candidates, l1_score_C), "l1" not in steps.degraded

    key = (request.user_id, request.feed_type, request.geohash, request.surface)
    depends_on = (Same(candidates), Same(world.models), request.user.pick(world.models.l1.user_features).tobytes())
    scored, was_there = yield from world.caches.l1.path(key, depends_on, make)
    if was_there:
        steps.cached.append("l1")
        steps.timings_ms["l1"] = 0.0
    return scored.l1_score_C, made


def hydrate(request: Request, row_C: np.ndarray, note_ids: Sequence[str] | None = None) -> Hydrated:
    """The features of these rows of the catalogue; `note_ids` names them where a row may be -1, an unknown note."""
    world = request.world
    return hydrate_candidates(
        request.view,
        world.groups,
        world.catalogue,
        request.user_id,
        row_C,
        request.t_us,
        world.tables,
        world.assembled,
        note_ids,
    )


def _sampled(request_id: str, num_candidates: int, share: float) -> np.ndarray:
    """int64, ascending: the candidates whose features are logged although they are not shown; the same for the same request."""
    seed = int.from_bytes(blake2b(request_id.encode(), digest_size=8).digest())
    return drawn(seed, num_candidates, share)


@compiled("i8[::1](u8, i8, f8)")
def drawn(seed, num_candidates, share):
    """int64: those of the places below num_candidates that a draw of their own takes, each with probability `share`. Draws are
    those of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    places, count = np.empty(num_candidates, np.int64), 0
    for place in range(num_candidates):
        seed += np.uint64(0x9E3779B97F4A7C15)
        mixed = (seed ^ (seed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        if (mixed >> np.uint64(11)) * 2.0**-53 < share:
            places[count] = place
            count += 1
    return places[:count].copy()


def _spread(values_S: np.ndarray, survivors_S: np.ndarray, num_candidates: int) -> np.ndarray:
    """float64 [..., C]: the survivors' values at their places, NaN elsewhere."""
    values_C = np.full((*values_S.shape[:-1], num_candidates), np.nan)
    values_C[..., survivors_S] = values_S
    return values_C


def _spread_all(predictions_S: Mapping[str, np.ndarray], survivors_S: np.ndarray, num_candidates: int) -> dict[str, np.ndarray]:
    if not predictions_S:
        return {}
    scores_TC = _spread(np.stack(list(predictions_S.values())), survivors_S, num_candidates)
    return dict(zip(predictions_S, scores_TC, strict=True))
