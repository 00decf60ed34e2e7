"""Directed item-to-item with decay (`co_occurrence`), asked with the whole history. Learns nothing; untuned it is the floor.

U users, Q queries, I items.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_matrix, diags

from models_ml import co_occurrence
from models_ml.benchmark.protocol import Question, figures, places_of
from models_ml.benchmark.sequences import Sequences
from warehouse.connections import plain_connection

CHOSEN_BY = "ndcg@10"
MOST_ASKED = 3000
_REACHES = ((5, 0.5), (10, 0.7), (20, 0.85), (40, 0.93), (60, 0.97))
_POWERS = (0.0, 0.15, 0.3, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class DirectedConfig:
    """window, decay: of the pairs counted; normalise_*: powers of the supports; seed_decay: per item of the history."""

    window: int = 10
    decay: float = 0.7
    normalise_from: float = 0.5
    normalise_to: float = 0.5
    seed_decay: float = 0.7


class Directed:
    """The counts of some sequences under a config."""

    def __init__(self, learned: Sequences, config: DirectedConfig, counts_II: csr_matrix | None = None):
        """counts_II: `counted(learned, config.window, config.decay)`, where it is known already."""
        counts_II = counted(learned, config.window, config.decay) if counts_II is None else counts_II
        support_I = np.maximum(np.bincount(learned.items_P, minlength=learned.num_items), 1).astype(np.float64)
        from_I, to_I = (diags(support_I**-power) for power in (config.normalise_from, config.normalise_to))
        self._weights_II = csr_matrix(from_I @ counts_II @ to_I, dtype=np.float32)
        self._seed_decay = config.seed_decay

    def scores(self, histories: Sequences, users_Q: np.ndarray) -> np.ndarray:
        """float32 [Q, I]: the sum over the history of seed_decay ** (items since) * weight."""
        return (decayed_histories(histories, users_Q, self._seed_decay) @ self._weights_II).toarray()


def counted(learned: Sequences, window: int, decay: float) -> csr_matrix:
    """float32 sparse [I, I]: row a, column b holds the decayed number of times that b came after a."""
    lengths_U = learned.lengths
    table = pa.table(
        {
            "user_id": np.repeat(np.arange(learned.num_users), lengths_U),
            "note_id": learned.items_P,
            "place": np.arange(len(learned.items_P)) - np.repeat(learned.starts_U1[:-1], lengths_U),
        }
    )
    parameters = {
        "window": window, "decay": decay, "normalise_from": 0.0, "normalise_to": 0.0, "neighbours": learned.num_items,
    }  # fmt: skip
    with plain_connection() as connection:
        connection.register("sequences", table)
        occurrences = "occurrences as (select user_id, note_id, place from sequences)"
        found = co_occurrence.neighbours(connection, occurrences, parameters)
    rows, columns, scores = (found[name].to_numpy() for name in ("note_id", "neighbour_id", "score"))
    return csr_matrix((scores, (rows, columns)), shape=(learned.num_items,) * 2)


def choose(validation: Question) -> DirectedConfig:
    """The best config on (at most 3,000 of) the validation items, one setting after the other, twice: how far to look, then
    each power."""
    asked = validation.some(MOST_ASKED)
    known: dict[tuple[int, float], csr_matrix] = {}
    values: dict[DirectedConfig, float] = {}

    def value(config: DirectedConfig) -> float:
        if config not in values:
            reach = config.window, config.decay
            if reach not in known:
                known[reach] = counted(validation.histories, *reach)
            model = Directed(validation.histories, config, known[reach])
            values[config] = figures(places_of(model, asked))[CHOSEN_BY]
        return values[config]

    best = DirectedConfig()
    for _ in range(2):
        reaches = [replace(best, window=window, decay=decay, seed_decay=decay) for window, decay in _REACHES]
        best = max(reaches, key=value)
        best = max((replace(best, normalise_to=power) for power in _POWERS), key=value)
        best = max((replace(best, normalise_from=power) for power in _POWERS), key=value)
    return best


def decayed_histories(histories: Sequences, users_Q: np.ndarray, decay: float) -> csr_matrix:
    """float32 sparse [Q, I]: decay ** (items since); an item that occurs twice counts both times."""
    parts = [histories.of(user) for user in users_Q]
    lengths_Q = np.array([len(part) for part in parts])
    ages = np.concatenate([np.arange(length)[::-1] for length in lengths_Q])
    rows = np.repeat(np.arange(len(users_Q)), lengths_Q)
    weights = np.power(np.float32(decay), ages.astype(np.float32))
    return csr_matrix((weights, (rows, np.concatenate(parts))), shape=(len(users_Q), histories.num_items))
