"""A linear model of the next item, in closed form: ridge regression from the decayed recent past to what came next.

P places with a past, I items: X [P, I] holds decay ** (places since) for the last `window` items, Y [P, I] the item that came.
weights = (X'X + ridge * 1)^-1 X'Y, so that, unlike counts, an item is not credited with what its neighbours in time explain.
Cost: I ** 3 operations and two float32 matrices [I, I]; left out above `MOST_ITEMS`.
Sources: EASE (Steck, WWW 2019), SLIT (Choi et al., WWW 2021).
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse import csr_matrix

from models_ml.benchmark.directed import decayed_histories
from models_ml.benchmark.protocol import Question, figures, places_of
from models_ml.benchmark.sequences import Sequences

MOST_ITEMS = 6_000
CHOSEN_BY = "ndcg@10"
MOST_ASKED = 3000
_REACHES = ((10, 0.7), (20, 0.9))
_RIDGES = (30.0, 100.0, 300.0, 1000.0)


@dataclass(frozen=True)
class LinearConfig:
    """window, decay: of the past that explains; ridge: what each weight costs; seed_decay: per item of the history."""

    window: int = 10
    decay: float = 0.7
    ridge: float = 20.0
    seed_decay: float = 0.7


class Linear:
    """weights_II: float32, row a holds what a says for every item as the next one."""

    def __init__(self, learned: Sequences, config: LinearConfig):
        """Raises ValueError above MOST_ITEMS items."""
        if learned.num_items > MOST_ITEMS:
            raise ValueError(f"learned must have at most {MOST_ITEMS} items, got {learned.num_items}")
        self._seed_decay = config.seed_decay
        past_PI, next_PI = pairs(learned, config.window, config.decay)
        gram_II = (past_PI.T @ past_PI).toarray()
        gram_II[np.diag_indices_from(gram_II)] += config.ridge
        factor = cho_factor(gram_II, lower=True, overwrite_a=True, check_finite=False)
        self._weights_II = cho_solve(factor, (past_PI.T @ next_PI).toarray(), overwrite_b=True, check_finite=False)

    def scores(self, histories: Sequences, users_Q: np.ndarray) -> np.ndarray:
        """float32 [Q, I]: the decayed history times the weights."""
        return decayed_histories(histories, users_Q, self._seed_decay) @ self._weights_II


def choose(validation: Question) -> LinearConfig:
    """The best reach and ridge on (at most 3,000 of) the validation items."""
    asked = validation.some(MOST_ASKED)

    def value(config: LinearConfig) -> float:
        return figures(places_of(Linear(validation.histories, config), asked))[CHOSEN_BY]

    configs = [LinearConfig(window, decay, ridge, decay) for window, decay in _REACHES for ridge in _RIDGES]
    return max(configs, key=value)


def pairs(learned: Sequences, window: int, decay: float) -> tuple[csr_matrix, csr_matrix]:
    """(X, Y), float32 sparse [P, I]; a place is every item but the first of its sequence."""
    place_P = np.arange(len(learned.items_P)) - np.repeat(learned.starts_U1[:-1], learned.lengths)
    targets = np.flatnonzero(place_P > 0)
    rows, columns, weights = [], [], []
    for since in range(window):
        has_one = place_P[targets] > since
        rows.append(np.flatnonzero(has_one))
        columns.append(learned.items_P[targets[has_one] - 1 - since])
        weights.append(np.full(int(has_one.sum()), decay**since, dtype=np.float32))
    shape = (len(targets), learned.num_items)
    past_PI = csr_matrix((np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))), shape=shape)
    ones_P = np.ones(len(targets), dtype=np.float32)
    return past_PI, csr_matrix((ones_P, (np.arange(len(targets)), learned.items_P[targets])), shape=shape)
