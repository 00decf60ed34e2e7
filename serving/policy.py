"""Rules of the page, applied last, place by place: nothing blocked, no note twice, not too much of one author or topic, notes
unlike their neighbours, some places for notes that the models would not pick, and never a short page while candidates exist.

Each place is one choice among the candidates that are left, so its propensity is known: the probability that this note took
this place, given the places before it. It is what off-policy estimates divide by. The loop over the places is compiled and
stands in `placing`; chance stands here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

import numpy as np

from serving import placing

CAP_RELAXED = {"author": "author_cap_relaxed", "topic": "topic_cap_relaxed"}
AUTHOR_CAP_RELAXED, TOPIC_CAP_RELAXED = CAP_RELAXED["author"], CAP_RELAXED["topic"]
RANKED, PROMOTED, COLD_START, EXPLORATION = placing.SLOTS
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
    """S candidates, best first. note_S, author_S, topic_S: int64, one number for each note, author and topic, -1 for none.
    relevance_S: float64, from 0 to 1. vectors_VD: float32, unit rows. vector_S: int64, each candidate's row of them, -1 for
    none. may_show_S: false is never shown."""

    note_S: np.ndarray
    author_S: np.ndarray
    topic_S: np.ndarray
    relevance_S: np.ndarray
    vectors_VD: np.ndarray
    vector_S: np.ndarray
    may_show_S: np.ndarray
    is_promoted_S: np.ndarray
    is_cold_S: np.ndarray

    def __len__(self) -> int:
        return len(self.note_S)


@dataclass(frozen=True)
class Placed:
    """One place of the page. candidate: its place in the pool. slot: what put it there."""

    candidate: int
    slot: str
    propensity: float


def arrange_best(
    head_of: Callable[[int], Pool], num_candidates: int, page_size: int, rules: Rules, random: Random
) -> tuple[list[Placed], list[str]]:
    """`arrange` of all candidates, of which only as many are looked at as it takes. head_of: so many of the best, each note
    once."""
    reached = page_size + rules.max_displacement
    head = num_candidates if rules.slots else 2 * reached
    while True:
        pool = head_of(head)
        placed, relaxed = arrange(pool, page_size, rules, random)
        if head >= num_candidates:
            return placed, relaxed
        # no slot looks beyond the head, so a full page for which no rule gave way is the page of all
        if len(placed) == page_size and not relaxed and pool.may_show_S.sum() >= reached:
            return placed, relaxed
        head *= 4


def arrange(pool: Pool, page_size: int, rules: Rules, random: Random) -> tuple[list[Placed], list[str]]:
    """The page, first place first, and the rules that had to give way for it to be full.

    A ranked note stands at most `max_displacement` places from where its score would put it, unless a cap or a slot moves it. A
    slot that no candidate fits is a ranked place. An exploration slot draws, with probability `exploration_share`, one of the
    candidates that the caps allow, each as likely as any other. Caps of 0 are no caps; notes without an author or topic have
    none. random: draws nothing unless there are exploration slots.
    """
    kept_P, drawn_P = np.zeros(page_size, np.int64), np.full(page_size, -1)
    for place, slot in rules.slots.items():
        if 0 <= place < page_size:
            kept_P[place] = placing.SLOTS.index(slot)
    explored: dict[int, Placed] = {}
    while True:
        num_filled, chosen_P, slot_P, relaxed, ranked, may_draw_S = placing.fill(
            pool.note_S,
            pool.author_S,
            pool.topic_S,
            pool.relevance_S,
            pool.vectors_VD,
            pool.vector_S,
            pool.may_show_S,
            pool.is_promoted_S,
            pool.is_cold_S,
            kept_P,
            drawn_P,
            rules.max_notes_per_author,
            rules.max_notes_per_topic,
            placing.METHODS.index(rules.diversity),
            rules.diversity_strength,
            rules.diversity_window,
            rules.max_displacement,
        )
        if ranked < 0:
            break
        explored[num_filled] = _drawn(ranked, np.flatnonzero(may_draw_S), rules.exploration_share, random)
        drawn_P[num_filled] = explored[num_filled].candidate
    placed = [
        explored.get(place) or Placed(int(chosen_P[place]), placing.SLOTS[slot_P[place]], 1.0) for place in range(num_filled)
    ]
    return placed, [CAP_RELAXED[placing.CAPS[cap]] for cap in relaxed.tolist() if cap >= 0]


def _drawn(ranked: int, open_places: np.ndarray, exploration_share: float, random: Random) -> Placed:
    """What takes a place of exploration. ranked: what takes it otherwise."""
    share = exploration_share / len(open_places)
    explored = random.random() < exploration_share
    candidate = int(open_places[random.randrange(len(open_places))]) if explored else ranked
    as_ranked = 1.0 - exploration_share if candidate == ranked else 0.0
    return Placed(candidate, EXPLORATION if explored else RANKED, share + as_ranked)
