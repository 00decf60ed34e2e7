"""Leave-one-out with full ranking: a user's last item is the test, the one before it validation, the rest is learned from.

Every item that is not in the user's history is ranked. Ties, by rule: an item that scores as much as the target stands before
it, so equal scores for everything are worth nothing. A target that the history already holds is a miss.
Q queries (users who are asked), I items. Sources: Kang and McAuley, ICDM 2018; Krichene and Rendle, KDD 2020 (full ranking).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from models_ml.benchmark.sequences import Sequences

AT = (5, 10, 20)
RULES = (
    "leave-one-out: a user's last item is the test, the last but one validation, the rest is learned from; users with fewer "
    "than 3 items are learned from and not asked; every item outside the history is ranked; items tied with the target stand "
    "before it (pessimistic); HR@k and NDCG@k are means over users"
)
QUERIES_AT_ONCE = 512


class Scorer(Protocol):
    """What has learned from sequences and gives every item a score as the next one."""

    def scores(self, histories: Sequences, users_Q: np.ndarray) -> np.ndarray:
        """float32 [Q, I]; higher is more likely. Row q is for `histories.of(users_Q[q])`."""


@dataclass(frozen=True)
class Question:
    """histories: what a scorer may read of each user; users_Q: who is asked; targets_Q: the item that came next."""

    histories: Sequences
    users_Q: np.ndarray
    targets_Q: np.ndarray

    def some(self, most: int, seed: int = 0) -> "Question":
        """At most `most` of the users, drawn by `seed`."""
        if len(self.users_Q) <= most:
            return self
        drawn = np.sort(np.random.default_rng(seed).choice(len(self.users_Q), most, replace=False))
        return Question(self.histories, self.users_Q[drawn], self.targets_Q[drawn])

    def parts(self) -> Iterator["Question"]:
        for start in range(0, len(self.users_Q), QUERIES_AT_ONCE):
            some = slice(start, start + QUERIES_AT_ONCE)
            yield Question(self.histories, self.users_Q[some], self.targets_Q[some])


def split(sequences: Sequences) -> tuple[Question, Question]:
    """(validation, test). `validation.histories` is what may be learned from while choosing; the test's have one item more."""
    is_asked_U = sequences.lengths >= 3
    users_Q = np.flatnonzero(is_asked_U)
    ends_Q = sequences.starts_U1[1:][users_Q]
    validation, test = (
        Question(sequences.cut(sequences.lengths - held * is_asked_U), users_Q, sequences.items_P[ends_Q - held])
        for held in (2, 1)
    )
    return validation, test


def places(scores_QI: np.ndarray, question: Question) -> np.ndarray:
    """int64 [Q]: how many items stand before the target, under the rules above; I where the history holds the target.

    Raises ValueError if a score is not a number.
    """
    if np.isnan(scores_QI).any():
        raise ValueError("scores_QI must be numbers, got NaN")
    own_Q = scores_QI[np.arange(len(scores_QI)), question.targets_Q]
    before_Q = (scores_QI >= own_Q[:, None]).sum(1) - 1
    for query, user in enumerate(question.users_Q):
        history = np.unique(question.histories.of(user))
        if question.targets_Q[query] in history:
            before_Q[query] = scores_QI.shape[1]
        else:
            before_Q[query] -= (scores_QI[query, history] >= own_Q[query]).sum()
    return before_Q


def places_of(scorer: Scorer, question: Question) -> np.ndarray:
    """`places`, a few hundred users at a time."""
    return np.concatenate([places(scorer.scores(part.histories, part.users_Q), part) for part in question.parts()])


def figures(places_Q: np.ndarray) -> dict[str, float]:
    """HR@k and NDCG@k for k in AT; one relevant item a user, so the ideal DCG is 1."""
    found = {}
    for k in AT:
        is_hit_Q = places_Q < k
        found[f"hr@{k}"] = float(is_hit_Q.mean())
        found[f"ndcg@{k}"] = float((is_hit_Q / np.log2(2.0 + places_Q)).mean())
    return found
