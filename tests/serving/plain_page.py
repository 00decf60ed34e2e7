"""The page place by place, in NumPy and dictionaries: slower than `serving.placing` and easier to read, and its judge.

Shape letters: S candidates, N of them asked about, D dimensions, W notes of the page that are looked back at.
"""

import math
from collections import Counter
from collections.abc import Callable
from random import Random

import numpy as np

from serving.policy import AUTHOR_CAP_RELAXED, COLD_START, EXPLORATION, PROMOTED, RANKED, TOPIC_CAP_RELAXED, Placed, Pool, Rules

Gains = Callable[[list[int], np.ndarray], np.ndarray]
"""(candidates on the page so far, first place first; those asked about [N]) → float64 [N], how much each would add next."""
_SPANNED = 1e-7


def relevance_only(relevance_S: np.ndarray, vectors_SD: np.ndarray, strength: float, window: int) -> Gains:
    return lambda page, asked_N: relevance_S[asked_N]


def sliding_spectrum(relevance_S: np.ndarray, vectors_SD: np.ndarray, strength: float, window: int) -> Gains:
    cosine_SS = vectors_SD @ vectors_SD.T

    def gains(page: list[int], asked_N: np.ndarray) -> np.ndarray:
        seen = [note for note in (page[-(window - 1) :] if window > 1 else []) if cosine_SS[note, note]]
        if not seen:
            return relevance_S[asked_N] + strength
        inverse_WW, volume = _inverse_cholesky(cosine_SS[np.ix_(seen, seen)].tolist())
        along_WN = np.array(inverse_WW) @ cosine_SS[np.ix_(seen, asked_N)]
        residual_N = np.sqrt(np.maximum(1.0 - (along_WN * along_WN).sum(axis=0), 0.0))
        return relevance_S[asked_N] + strength * volume * residual_N

    return gains


def _inverse_cholesky(gram_WW: list[list[float]]) -> tuple[list[list[float]], float]:
    size = len(gram_WW)
    inverse, volume = [[0.0] * size for _ in range(size)], 1.0
    for row in range(size):
        along = [sum(inverse[k][m] * gram_WW[row][m] for m in range(k + 1)) for k in range(row)]
        adds = math.sqrt(max(gram_WW[row][row] - sum(share * share for share in along), 0.0))
        if adds < _SPANNED:
            return inverse, 0.0
        volume *= adds
        inverse[row][row] = 1.0 / adds
        for column in range(row):
            inverse[row][column] = -sum(along[k] * inverse[k][column] for k in range(column, row)) / adds
    return inverse, volume


def marginal_relevance(relevance_S: np.ndarray, vectors_SD: np.ndarray, strength: float, window: int) -> Gains:
    def gains(page: list[int], asked_N: np.ndarray) -> np.ndarray:
        seen = page[-window:] if window > 0 else []
        if not seen:
            return relevance_S[asked_N]
        return relevance_S[asked_N] - strength * np.clip((vectors_SD[asked_N] @ vectors_SD[seen].T).max(axis=1), 0.0, 1.0)

    return gains


METHODS = {"none": relevance_only, "ssd": sliding_spectrum, "mmr": marginal_relevance}


def as_relevance(scores_S: np.ndarray) -> np.ndarray:
    finite = np.isfinite(scores_S)
    if not finite.any():
        return np.zeros(len(scores_S))
    low, high = scores_S[finite].min(), scores_S[finite].max()
    scaled_S = (scores_S - low) / (high - low) if high > low else np.ones(len(scores_S))
    return np.where(finite, scaled_S, 0.0)


def arrange(pool: Pool, page_size: int, rules: Rules, random: Random) -> tuple[list[Placed], list[str]]:
    """As `serving.policy.arrange`."""
    page, placed = _Page(pool, rules), []
    for place in range(page_size):
        allowed_S = page.allowed()
        if allowed_S is None:
            break
        placed.append(_choose(page, allowed_S, place, rules, random))
        page.put(placed[-1].candidate)
    return placed, page.relaxed


def _choose(page: "_Page", allowed_S: np.ndarray, place: int, rules: Rules, random: Random) -> Placed:
    slot = rules.slots.get(place)
    wanted_S = {PROMOTED: page.pool.is_promoted_S, COLD_START: page.pool.is_cold_S}.get(slot or "")
    if wanted_S is not None and (fitting := np.flatnonzero(allowed_S & wanted_S)).size:
        return Placed(int(fitting[0]), str(slot), 1.0)
    ranked = page.ranked(allowed_S, place)
    if slot != EXPLORATION:
        return Placed(ranked, RANKED, 1.0)
    open_places = np.flatnonzero(allowed_S)
    share = rules.exploration_share / len(open_places)
    explored = random.random() < rules.exploration_share
    candidate = int(open_places[random.randrange(len(open_places))]) if explored else ranked
    as_ranked = 1.0 - rules.exploration_share if candidate == ranked else 0.0
    return Placed(candidate, EXPLORATION if explored else RANKED, share + as_ranked)


class _Page:
    """The page so far and what is left for it."""

    def __init__(self, pool: Pool, rules: Rules):
        self.pool, self._rules = pool, rules
        self.relaxed: list[str] = []
        self._shown: list[int] = []
        self._left_S = pool.may_show_S & _is_first(pool.note_S)
        self._rank_S = np.cumsum(self._left_S) - 1
        self._author_left_S, self._topic_left_S = np.ones(len(pool), bool), np.ones(len(pool), bool)
        self._of_author, self._of_topic = Counter[int](), Counter[int]()
        vectors_SD = np.array([pool.vectors_VD[row] if row >= 0 else 0 * pool.vectors_VD[0] for row in pool.vector_S], float)
        method = METHODS[rules.diversity]
        self._gains = method(
            pool.relevance_S,
            vectors_SD.reshape(len(pool), pool.vectors_VD.shape[1]),
            rules.diversity_strength,
            rules.diversity_window,
        )

    def allowed(self) -> np.ndarray | None:
        """bool [S]: what may take the next place; None where nothing is left. Where the caps leave nothing, the topics' gives
        way, then the authors'."""
        if not self._left_S.any():
            return None
        if (allowed_S := self._left_S & self._author_left_S & self._topic_left_S).any():
            return allowed_S
        if (allowed_S := self._left_S & self._author_left_S).any():
            self._relax(TOPIC_CAP_RELAXED)
            return allowed_S
        self._relax(AUTHOR_CAP_RELAXED)
        if (allowed_S := self._left_S & self._topic_left_S).any():
            return allowed_S
        self._relax(TOPIC_CAP_RELAXED)
        return self._left_S

    def ranked(self, allowed_S: np.ndarray, place: int) -> int:
        """The candidate that adds most here, of those near enough; one that has waited as long as it may goes first."""
        best = int(np.argmax(allowed_S))
        reach = self._rules.max_displacement
        if self._rank_S[best] + reach <= place:
            return best
        near = np.flatnonzero(allowed_S & (self._rank_S <= place + reach))
        if not near.size:
            return best
        return int(near[np.argmax(self._gains(self._shown, near))])

    def put(self, candidate: int) -> None:
        self._shown.append(candidate)
        self._left_S[candidate] = False
        for cap, codes_S, counts, left_S in (
            (self._rules.max_notes_per_author, self.pool.author_S, self._of_author, self._author_left_S),
            (self._rules.max_notes_per_topic, self.pool.topic_S, self._of_topic, self._topic_left_S),
        ):
            code = int(codes_S[candidate])
            counts[code] += 1
            if cap and code >= 0 and counts[code] >= cap:
                left_S[codes_S == code] = False

    def _relax(self, rule: str) -> None:
        if rule not in self.relaxed:
            self.relaxed.append(rule)


def _is_first(numbers_S: np.ndarray) -> np.ndarray:
    """bool [S]: the first place of each number."""
    is_first_S = np.zeros(len(numbers_S), dtype=bool)
    is_first_S[np.unique(numbers_S, return_index=True)[1]] = True
    return is_first_S
