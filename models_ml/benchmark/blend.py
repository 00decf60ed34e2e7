"""A weighted sum of scorers, each made comparable first; the weights are chosen on validation.

Each member's scores of one user become z-scores over the items, and these their signed logarithm: counts score few items and
those by dozens of deviations, and would drown a member that spreads. Weights are searched one member at a time on a grid, from
the best single member on, until nothing gets better; a member that does not help has weight 0.
M members, Q users, I items.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from models_ml.benchmark.protocol import Question, Scorer, figures, places
from models_ml.benchmark.sequences import Sequences

GRID = (0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.65, 1.0, 1.5)
CHOSEN_BY = "ndcg@10"
MOST_ASKED = 2000
_ROUNDS = 2


class Blend:
    """weights: one per member; only those above 0 are asked."""

    def __init__(self, members: Sequence[Scorer], weights: Sequence[float]):
        self._parts = [(member, weight) for member, weight in zip(members, weights, strict=True) if weight > 0]

    def scores(self, histories: Sequences, users_Q: np.ndarray) -> np.ndarray:
        """float32 [Q, I]."""
        total_QI = np.zeros((len(users_Q), histories.num_items), dtype=np.float32)
        for member, weight in self._parts:
            total_QI += np.float32(weight) * standardised(member.scores(histories, users_Q))
        return total_QI


def standardised(scores_QI: np.ndarray) -> np.ndarray:
    """sign(z) * log(1 + |z|) of each row's z-scores; a row of one value becomes zeros."""
    spread_Q1 = scores_QI.std(axis=1, keepdims=True)
    z_QI = (scores_QI - scores_QI.mean(axis=1, keepdims=True)) / np.where(spread_Q1 > 0, spread_Q1, 1)
    return np.copysign(np.log1p(np.abs(z_QI)), z_QI)


def choose_weights(members: Mapping[str, Scorer], validation: Question) -> dict[str, float]:
    """Member -> weight, the best member's being 1. At most MOST_ASKED users are asked; memory is M * Q * I * 4 bytes."""
    asked = validation.some(MOST_ASKED)
    standard = {name: _standard_scores(member, asked) for name, member in members.items()}
    alone = {name: _value(scores_QI, asked) for name, scores_QI in standard.items()}
    first = max(alone, key=lambda name: alone[name])
    weights = {name: float(name == first) for name in members}
    best, total_QI = alone[first], standard[first].copy()
    for _ in range(_ROUNDS):
        before = best
        for name in (name for name in members if name != first):
            rest_QI = total_QI - np.float32(weights[name]) * standard[name]
            values = {weight: _value(rest_QI + np.float32(weight) * standard[name], asked) for weight in GRID}
            weight = max(values, key=lambda weight: values[weight])
            if values[weight] > best:
                best, weights[name] = values[weight], weight
            total_QI = rest_QI + np.float32(weights[name]) * standard[name]
        if best <= before:
            break
    return weights


def _standard_scores(member: Scorer, asked: Question) -> np.ndarray:
    return np.concatenate([standardised(member.scores(part.histories, part.users_Q)) for part in asked.parts()])


def _value(scores_QI: np.ndarray, asked: Question) -> float:
    return figures(places(scores_QI, asked))[CHOSEN_BY]
