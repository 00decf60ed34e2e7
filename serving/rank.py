"""L1 and L2: scores for candidates, and the one number that orders them. Models are asked on a path (`serving.company`).

Shape letters: C candidates (of any stage). Scores that are not finite count as a failed stage, never as a score; a failed stage
costs its scores, never the page.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from models_ml.ordering import largest_first
from models_ml.scoring import RankingRequest
from serving.company import Answer, Asked, Path
from serving.hydrate import Hydrated
from serving.request import Request

log = logging.getLogger(__name__)


class StageError(Exception):
    """A model gave no usable scores; the cascade goes on without that stage and says so."""


def run_l1(request: Request, candidates: Hydrated) -> Path[np.ndarray]:
    """l1_score float64 [C], NaN if L1 fails."""
    if len(candidates) == 0:
        return np.empty(0)
    model = request.world.models.l1
    asked = RankingRequest(request.user.pick(model.user_features), candidates, request.surface, rows=candidates.row_C)
    try:
        answer: Answer = yield Asked(model.score_many, asked, len(candidates))
        request.world.pace.note("l1", answer.took_ms, answer.size)
        return _usable("L1", answer.scores, len(candidates))
    except Exception:
        log.exception("L1 failed; the order of the stage before it stands")
        request.steps.degraded.append("l1")
        return np.full(len(candidates), np.nan)


def run_l2(
    request: Request, candidates: Hydrated, score_so_far_C: np.ndarray, note_ids: Sequence[str] = ()
) -> Path[tuple[dict[str, np.ndarray], np.ndarray]]:
    """(head → probabilities float64 [C], final_score float64 [C]). If L2 fails, the score so far is the final one.

    note_ids: name the candidates where one may be unknown to the catalogue, as in `cascade.hydrate`."""
    if len(candidates) == 0:
        return {}, np.empty(0)
    world, model = request.world, request.world.models.l2
    asked = RankingRequest(
        request.user.pick(model.user_features),
        candidates,
        request.surface,
        request.history,
        note_ids,
        world.readers.attributes(request.user_id),
        candidates.row_C,
        world.models.codes_of(candidates.row_C),
    )
    try:
        answer: Answer = yield Asked(model.score_many, asked, len(candidates))
        world.pace.note("l2", answer.took_ms, answer.size)
        scores_TC = np.stack(
            [_shaped(f"L2's head {head}", of_head, len(candidates)) for head, of_head in answer.scores.items()]
        )
        _check_finite("L2", scores_TC)
        predictions = dict(zip(answer.scores, scores_TC, strict=True))
        return predictions, mix(predictions, world.settings.head_weights)
    except Exception:
        log.exception("L2 failed; the order of the stage before it stands")
        request.steps.degraded.append("l2")
        return {}, score_so_far(score_so_far_C)


def score_so_far(scores_C: np.ndarray) -> np.ndarray:
    """float64 [C]: the scores of the stage before; where it gave none, ones that keep the order that came in."""
    return np.where(np.isfinite(scores_C), scores_C, as_given(len(scores_C)))


def mix(predictions: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """float64 [C]: sum over heads of weight × probability. Heads without a weight weigh nothing."""
    weighted = [weights.get(head, 0.0) * scores_C for head, scores_C in predictions.items()]
    return np.sum(weighted, axis=0)


def best_first(scores_C: np.ndarray, top_k: int) -> np.ndarray:
    """Positions of the top_k scores (float64), best first; ties keep the earlier candidate first."""
    return largest_first(scores_C, np.arange(len(scores_C)))[:top_k]


def as_given(num_candidates: int) -> np.ndarray:
    """Scores that keep the order that came in, where no stage gave any."""
    return -np.arange(num_candidates, dtype=np.float64)


def _usable(what: str, scores: np.ndarray, num_candidates: int) -> np.ndarray:
    scores_C = _shaped(what, scores, num_candidates)
    _check_finite(what, scores_C)
    return scores_C


def _shaped(what: str, scores: np.ndarray, num_candidates: int) -> np.ndarray:
    scores_C = np.asarray(scores, dtype=np.float64)
    if scores_C.shape != (num_candidates,):
        raise StageError(f"{what} gave scores of shape {scores_C.shape} for {num_candidates} candidates")
    return scores_C


def _check_finite(what: str, scores: np.ndarray) -> None:
    if not np.isfinite(scores).all():
        raise StageError(f"{what} gave {int((~np.isfinite(scores)).sum())} scores of {scores.size} that are not finite")
