"""Rules of the page, applied last, place by place: nothing blocked, no note twice, not too much of one author or topic, notes
unlike their neighbours, some places for notes that the models would not pick, and never a short page while candidates exist.

Each place is one choice among the candidates that are left, so its propensity is known: the probability that this note took
this place, given the places before it. It is what off-policy estimates divide by.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from random import Random

import numpy as np

from serving.diversity import METHODS, as_relevance

AUTHOR_CAP_RELAXED = "author_cap_relaxed"
TOPIC_CAP_RELAXED = "topic_cap_relaxed"
RANKED, EXPLORATION, COLD_START, PROMOTED = "ranked", "exploration", "cold_start", "promoted"
SLOTS = (PROMOTED, COLD_START, EXPLORATION)
"""What a place may be kept for; the first in this order has it where two want the same."""


@dataclass(frozen=True)
class Rules:
    """The dials of the policy; what each means stands in `settings.yml`."""

    max_notes_per_author: int = 0
    max_notes_per_topic: int = 0
    diversity: str = "none"
    diversity_strength: float = 0.0
    diversity_window: int = 1
    max_displacement: int = 0
    slots: Mapping[int, str] = field(default_factory=dict)
    """Place on the page, from 0 → what it is kept for."""
    exploration_share: float = 0.0


@dataclass(frozen=True)
class Pool:
    """S candidates, best first. note_S, author_S, topic_S: one number for each note, author and topic, -1 for none.
    vectors_SD: unit rows, zeros where a note has no vector. may_show_S: false is never shown."""

    note_S: np.ndarray
    author_S: np.ndarray
    topic_S: np.ndarray
    scores_S: np.ndarray
    vectors_SD: np.ndarray
    may_show_S: np.ndarray
    is_promoted_S: np.ndarray
    is_cold_S: np.ndarray

    def __len__(self) -> int:
        return len(self.note_S)

    def head(self, size: int) -> "Pool":
        """The best of them."""
        return Pool(*(getattr(self, field.name)[:size] for field in fields(self)))


@dataclass(frozen=True)
class Placed:
    """One place of the page. candidate: its place in the pool. slot: what put it there."""

    candidate: int
    slot: str
    propensity: float


def arrange(pool: Pool, page_size: int, rules: Rules, random: Random) -> tuple[list[Placed], list[str]]:
    """The page, first place first, and the rules that had to give way for it to be full.

    A ranked note stands at most `max_displacement` places from where its score would put it, unless a cap or a slot moves it. A
    slot that no candidate fits is a ranked place. An exploration slot draws, with probability `exploration_share`, one of the
    candidates that the caps allow, each as likely as any other. Caps of 0 are no caps; notes without an author or topic have
    none. random: draws nothing unless there are exploration slots.
    """
    relevance_S, reached = as_relevance(pool.scores_S), page_size + rules.max_displacement
    head = len(pool) if rules.slots else 2 * reached
    while True:
        page = _Page(pool.head(head), relevance_S[:head], rules)
        is_enough = head >= len(pool) or page.num_showable >= reached
        placed = _filled(page, page_size, rules, random) if is_enough else []
        # no slot looks beyond the head, so a full page for which no rule gave way is the page of the whole pool
        if head >= len(pool) or (len(placed) == page_size and not page.relaxed):
            return placed, page.relaxed
        head *= 4


def _filled(page: "_Page", page_size: int, rules: Rules, random: Random) -> list[Placed]:
    placed: list[Placed] = []
    for place in range(page_size):
        allowed_S = page.allowed()
        if allowed_S is None:
            break
        chosen = _choose(page, allowed_S, place, rules, random)
        page.put(chosen.candidate)
        placed.append(chosen)
    return placed


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

    def __init__(self, pool: Pool, relevance_S: np.ndarray, rules: Rules):
        self.pool, self._rules = pool, rules
        self.relaxed: list[str] = []
        self._shown: list[int] = []
        self._left_S = pool.may_show_S & _is_first(pool.note_S)
        self._rank_S = np.cumsum(self._left_S) - 1
        self.num_showable = int(self._left_S.sum())
        self._author_left_S, self._topic_left_S = np.ones(len(pool), bool), np.ones(len(pool), bool)
        self._open_S = self._left_S.copy()
        """What is left, under both caps."""
        self._of_author, self._of_topic = Counter[int](), Counter[int]()
        self._gains = METHODS[rules.diversity](relevance_S, pool.vectors_SD, rules.diversity_strength, rules.diversity_window)

    def allowed(self) -> np.ndarray | None:
        """bool [S]: what may take the next place; None where nothing is left. Where the caps leave nothing, the topics' gives
        way, then the authors'."""
        if self._open_S.any():
            return self._open_S
        if not self._left_S.any():
            return None
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
        self._left_S[candidate] = self._open_S[candidate] = False
        for cap, codes_S, counts, left_S in (
            (self._rules.max_notes_per_author, self.pool.author_S, self._of_author, self._author_left_S),
            (self._rules.max_notes_per_topic, self.pool.topic_S, self._of_topic, self._topic_left_S),
        ):
            code = int(codes_S[candidate])
            counts[code] += 1
            if cap and code >= 0 and counts[code] >= cap:
                is_full_S = codes_S == code
                left_S[is_full_S] = self._open_S[is_full_S] = False

    def _relax(self, rule: str) -> None:
        if rule not in self.relaxed:
            self.relaxed.append(rule)


def _is_first(numbers_S: np.ndarray) -> np.ndarray:
    """bool [S]: the first place of each number."""
    is_first_S = np.zeros(len(numbers_S), dtype=bool)
    is_first_S[np.unique(numbers_S, return_index=True)[1]] = True
    return is_first_S
