"""The path of a request, top to bottom: retrieve, hydrate, L1, L2, policy.

Shape letters: C candidates in order of recall, S survivors of L1, F features. One StoreView per request: every feature of
every stage has one tick T and one log position K. Nothing here waits for a disk or a network.
"""

import json
import logging
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serving.hydrate import CandidateFeatures, UserFeatures, hydrate_candidates, hydrate_user
from serving.policy import arrange
from serving.rank import best_first, mix, score_l1, score_l2
from serving.retrieve import Candidates, Retrieval, retrieve
from serving.world import World
from streaming_sql.online_store import StoreView

log = logging.getLogger(__name__)

LAST_CLICKS = "user_last_clicks_30d"
NO_LOCATIONS = "nearby_without_locations"
NO_FOLLOWED_NOTES = "no_followed_notes"
SEEN_AGAIN = "seen_filter_relaxed"


@dataclass
class Steps:
    """Milliseconds per stage, and what was skipped, failed or relaxed."""

    timings_ms: dict[str, float] = field(default_factory=dict)
    degraded: list[str] = field(default_factory=list)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timings_ms[stage] = round((time.perf_counter() - started) * 1000, 3)


@dataclass(frozen=True)
class Served:
    """One answered request: everything the response, `/v1/explain` and the forward log say.

    Arrays are over the C candidates in order of recall; NaN where a stage did not score one. position_C: place on the page, -1
    if not shown. logged: the candidates whose features are kept (all shown, and a sampled share of the rest).
    """

    request_id: str
    user_id: str
    feed_type: str
    t_us: int
    tick_us: int
    position: tuple[int, ...]
    declarations_hash: str
    model_versions: Mapping[str, str]
    steps: Steps
    user: UserFeatures
    candidates: Candidates
    l1_score_C: np.ndarray
    predictions: Mapping[str, np.ndarray]
    final_score_C: np.ndarray
    position_C: np.ndarray
    logged: np.ndarray
    logged_features: CandidateFeatures

    def page(self) -> list[int]:
        """The candidates shown, first place first."""
        shown = np.flatnonzero(self.position_C >= 0)
        return shown[np.argsort(self.position_C[shown])].tolist()

    def impression_id(self, candidate: int) -> str | None:
        position = int(self.position_C[candidate])
        return f"{self.request_id}:{position}" if position >= 0 else None

    def predictions_of(self, candidate: int) -> dict[str, float]:
        return {head: float(scores[candidate]) for head, scores in self.predictions.items() if np.isfinite(scores[candidate])}

    def as_row(self) -> dict[str, Any]:
        """The row of `lake.forward_log`; instants as microseconds, maps as dicts."""
        place = {int(candidate): row for row, candidate in enumerate(self.logged)}
        return {
            "request_id": self.request_id,
            "user_id": self.user_id,
            "feed_type": self.feed_type,
            "request_ts": self.t_us,
            "feature_watermark": self.tick_us,
            "known_position": list(self.position),
            "declarations_hash": self.declarations_hash,
            "model_versions": json.dumps(dict(self.model_versions)),
            "degraded": list(self.steps.degraded),
            "timings_ms": json.dumps(self.steps.timings_ms),
            "user_features": self.user.as_dict(),
            "user_sequences": dict(self.user.sequences),
            "candidates": [self._candidate(candidate, place) for candidate in range(len(self.candidates))],
        }

    def _candidate(self, candidate: int, place: Mapping[int, int]) -> dict[str, Any]:
        position = int(self.position_C[candidate])
        return {
            "impression_id": self.impression_id(candidate),
            "note_id": self.candidates.note_ids[candidate],
            "author_id": self.candidates.author_ids[candidate],
            "sources": list(self.candidates.sources[candidate]),
            "recall_score": finite(self.candidates.recall_score_C[candidate]),
            "l1_score": finite(self.l1_score_C[candidate]),
            "final_score": finite(self.final_score_C[candidate]),
            "position": position if position >= 0 else None,
            "shown": position >= 0,
            "features": self.logged_features.row(place[candidate]) if candidate in place else None,
            "predictions": self.predictions_of(candidate),
        }


def feed(world: World, user_id: str, feed_type: str, page_size: int) -> Served:
    """A page of notes for one reader: the whole path. A reader never met is a cold start, not an error."""
    started = time.perf_counter()
    settings, steps = world.settings, Steps()
    t_us = world.clock.now_us()
    view = world.store.view(at_us=t_us)

    with steps.timed("hydrate_user"):
        user = hydrate_user(view, world.groups, user_id, t_us)
    with steps.timed("retrieve"):
        candidates = find_candidates(world, view, user, user_id, feed_type, page_size, t_us, steps)
    with steps.timed("hydrate_candidates"):
        features_CF = hydrate_candidates(
            view, world.groups, world.catalogue, user_id, candidates.note_ids, candidates.author_ids, t_us
        )
    with steps.timed("l1"):
        l1_score_C, survivors_S = run_l1(world, user, features_CF, candidates.recall_score_C, settings.l1_top_k, steps)
    with steps.timed("l2"):
        note_ids_S = [candidates.note_ids[candidate] for candidate in survivors_S]
        predictions_S, final_score_S = run_l2(
            world, user, user_id, note_ids_S, features_CF.take(survivors_S), l1_score_C[survivors_S], steps
        )
    with steps.timed("policy"):
        order_C = survivors_S[best_first(final_score_S, len(survivors_S))]
        page, relaxed = arrange(order_C, candidates.note_ids, candidates.author_ids, page_size, settings.max_notes_per_author)
        steps.degraded.extend(relaxed)

    request_id = uuid.uuid4().hex
    position_C = np.full(len(candidates), -1)
    position_C[page] = np.arange(len(page))
    logged = np.array(
        [c for c in range(len(candidates)) if position_C[c] >= 0 or _is_sampled(request_id, c, settings.logged_share)], int
    )
    steps.timings_ms["total"] = round((time.perf_counter() - started) * 1000, 3)
    return Served(
        request_id=request_id,
        user_id=user_id,
        feed_type=feed_type,
        t_us=t_us,
        tick_us=view.tick_us,
        position=tuple(view.position),
        declarations_hash=world.declarations_hash,
        model_versions=world.models.versions,
        steps=steps,
        user=user,
        candidates=candidates,
        l1_score_C=l1_score_C,
        predictions={head: _spread(scores_S, survivors_S, len(candidates)) for head, scores_S in predictions_S.items()},
        final_score_C=_spread(final_score_S, survivors_S, len(candidates)),
        position_C=position_C,
        logged=logged,
        logged_features=features_CF.take(logged),
    )


def retrieve_alone(world: World, user_id: str, feed_type: str, limit: int) -> tuple[Candidates, list[str]]:
    """The first stage alone: at most `limit` candidates, and what was degraded."""
    steps, t_us = Steps(), world.clock.now_us()
    view = world.store.view(at_us=t_us)
    user = hydrate_user(view, world.groups, user_id, t_us)
    candidates = find_candidates(world, view, user, user_id, feed_type, 1, t_us, steps)
    return candidates.take(np.arange(min(limit, len(candidates)))), steps.degraded


def rank_l1_alone(
    world: World, user_id: str, note_ids: Sequence[str], top_k: int
) -> tuple[list[str | None], np.ndarray, np.ndarray, list[str]]:
    """(authors [C], l1 scores [C], positions of the top_k best first, what was degraded) for candidates given from outside."""
    steps = Steps()
    user, authors, features_CF = _hydrate_given(world, user_id, note_ids)
    scores_C, order = run_l1(world, user, features_CF, _as_given(len(note_ids)), top_k, steps)
    return authors, scores_C, order, steps.degraded


def rank_l2_alone(
    world: World, user_id: str, note_ids: Sequence[str], top_k: int
) -> tuple[list[str | None], dict[str, np.ndarray], np.ndarray, np.ndarray, list[str]]:
    """(authors [C], probabilities per head, final scores [C], positions of the top_k best first, what was degraded)."""
    steps = Steps()
    user, authors, features_CF = _hydrate_given(world, user_id, note_ids)
    predictions, scores_C = run_l2(world, user, user_id, note_ids, features_CF, _as_given(len(note_ids)), steps)
    return authors, predictions, scores_C, best_first(scores_C, top_k), steps.degraded


def find_candidates(
    world: World, view: StoreView, user: UserFeatures, user_id: str, feed_type: str, at_least: int, t_us: int, steps: Steps
) -> Candidates:
    """The union of the generators that suit the feed type, without what the reader has seen.

    Where that leaves fewer than `at_least` notes although there are more, the rule that is least missed gives way first (only
    followed authors, then only unseen notes) and `degraded` says so.
    """
    catalogue, limits = world.catalogue, world.settings.generators
    exists_N = catalogue.exists_at(t_us)
    history = history_of(world, user, user_id)
    seen = [*world.readers.seen(user_id), *history]
    unseen_N = exists_N.copy()
    unseen_N[[catalogue.row_of[note_id] for note_id in seen if note_id in catalogue.row_of]] = False

    def found(eligible_N: np.ndarray, limits: Mapping[str, int]) -> Candidates:
        candidates, failed = retrieve(
            Retrieval(
                catalogue=catalogue,
                models=world.models,
                eligible_N=eligible_N,
                trending_rows=world.trending.rows(world, view, t_us),
                history=history,
                seeds=history[-world.settings.item_to_item_seeds :],
                followed_authors=world.readers.follows(user_id),
            ),
            limits,
        )
        steps.degraded.extend(name for name in failed if name not in steps.degraded)
        return candidates

    if feed_type == "NEARBY":
        steps.degraded.append(NO_LOCATIONS)
    if feed_type == "FOLLOW":
        candidates = found(unseen_N, {"followed_authors": limits.get("followed_authors", 0)})
        if len(candidates) > 0:
            return candidates
        steps.degraded.append(NO_FOLLOWED_NOTES)
    candidates = found(unseen_N, limits)
    if len(candidates) < at_least and exists_N.sum() > len(candidates):
        steps.degraded.append(SEEN_AGAIN)
        candidates = found(exists_N, limits)
    return candidates


def run_l1(
    world: World, user: UserFeatures, features_CF: CandidateFeatures, recall_score_C: np.ndarray, top_k: int, steps: Steps
) -> tuple[np.ndarray, np.ndarray]:
    """(l1_score_C, positions of the survivors best first). If L1 fails the order of recall stands, scores are NaN."""
    if len(recall_score_C) == 0:
        return np.empty(0), np.empty(0, dtype=np.int64)
    try:
        l1_score_C = score_l1(world.models.l1, user, features_CF).astype(np.float64)
    except Exception:  # the page is worth more than the stage
        log.exception("L1 failed; the order of recall stands")
        steps.degraded.append("l1")
        return np.full(len(recall_score_C), np.nan), best_first(recall_score_C, top_k)
    return l1_score_C, best_first(l1_score_C, top_k)


def run_l2(
    world: World,
    user: UserFeatures,
    user_id: str,
    note_ids_S: Sequence[str],
    features_SF: CandidateFeatures,
    l1_score_S: np.ndarray,
    steps: Steps,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(head → probabilities [S], final_score [S]). If L2 fails, L1's score is the final one."""
    if len(note_ids_S) == 0:
        return {}, np.empty(0)
    try:
        predictions = score_l2(world.models.l2, user, history_of(world, user, user_id), note_ids_S, features_SF)
        return predictions, mix(predictions, world.settings.head_weights)
    except Exception:  # the page is worth more than the stage
        log.exception("L2 failed; the order of L1 stands")
        steps.degraded.append("l2")
        return {}, np.where(np.isfinite(l1_score_S), l1_score_S, _as_given(len(l1_score_S)))


def history_of(world: World, user: UserFeatures, user_id: str) -> list[str]:
    """What the sequence models read, oldest first: what was watched before the log began, then the last clicks."""
    return [*world.readers.history_before_the_log(user_id), *_clicked_notes(user)]


def _hydrate_given(
    world: World, user_id: str, note_ids: Sequence[str]
) -> tuple[UserFeatures, list[str | None], CandidateFeatures]:
    t_us = world.clock.now_us()
    view = world.store.view(at_us=t_us)
    authors = [world.catalogue.author_of(note_id) for note_id in note_ids]
    user = hydrate_user(view, world.groups, user_id, t_us)
    return user, authors, hydrate_candidates(view, world.groups, world.catalogue, user_id, note_ids, authors, t_us)


def _as_given(num_candidates: int) -> np.ndarray:
    """Stands for the scores of an earlier stage: keeps the order that came in."""
    return -np.arange(num_candidates, dtype=np.float64)


def finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _clicked_notes(user: UserFeatures) -> list[str]:
    return user.sequences.get(LAST_CLICKS, [])


def _is_sampled(request_id: str, candidate: int, share: float) -> bool:
    return zlib.crc32(f"{request_id}:{candidate}".encode()) < share * 2**32


def _spread(values_S: np.ndarray, survivors_S: np.ndarray, num_candidates: int) -> np.ndarray:
    """float64 [C]: the survivors' values at their places, NaN elsewhere."""
    values_C = np.full(num_candidates, np.nan)
    values_C[survivors_S] = values_S
    return values_C
