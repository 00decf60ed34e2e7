"""L1 and L2: scores for candidates, and the one number that orders them.

Shape letters: C candidates, H heads. Scores that are not finite count as a failed stage, never as a score.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from serving.hydrate import CandidateFeatures, UserFeatures


class StageError(Exception):
    """A model gave no usable scores; the cascade goes on without that stage and says so."""


def score_l1(model: Any, user: UserFeatures, candidates: CandidateFeatures) -> np.ndarray:
    """float32 [C]: how likely a candidate is to survive L2; higher is better."""
    scores_C = np.asarray(model.score(user.pick(model.user_features), candidates.pick(model.note_features)), dtype=np.float32)
    return _usable("l1", scores_C, len(candidates.values_CF))


def score_l2(
    model: Any, user: UserFeatures, history: Sequence[str], note_ids: Sequence[str], candidates: CandidateFeatures
) -> dict[str, np.ndarray]:
    """head -> float32 [C] probabilities."""
    heads = model.score(user.pick(model.user_features), list(history), list(note_ids), candidates.pick(model.note_features))
    return {
        head: _usable(f"l2 head {head}", np.asarray(scores, dtype=np.float32), len(note_ids)) for head, scores in heads.items()
    }


def mix(predictions: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """float64 [C]: sum over heads of weight × probability. Heads without a weight weigh nothing."""
    weighted = [weights.get(head, 0.0) * scores_C.astype(np.float64) for head, scores_C in predictions.items()]
    return np.sum(weighted, axis=0)


def best_first(scores_C: np.ndarray, top_k: int) -> np.ndarray:
    """Positions of the top_k scores, best first; ties keep the earlier candidate first."""
    return np.argsort(-np.asarray(scores_C, dtype=np.float64), kind="stable")[:top_k]


def _usable(what: str, scores_C: np.ndarray, num_candidates: int) -> np.ndarray:
    if scores_C.shape != (num_candidates,):
        raise StageError(f"{what} gave scores of shape {scores_C.shape} for {num_candidates} candidates")
    if not np.isfinite(scores_C).all():
        raise StageError(f"{what} gave {int((~np.isfinite(scores_C)).sum())} scores of {num_candidates} that are not finite")
    return scores_C
