"""Candidate generators and their union: which few hundred of all notes are worth ranking for this reader.

Shape letters: N notes in the catalogue, C candidates. A generator takes a `Retrieval` and returns row numbers of the
catalogue, best first, already limited to `eligible_N`. One more generator is one more function and a line in `GENERATORS`.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from serving.catalogue import Catalogue

log = logging.getLogger(__name__)

RANK_DAMPING = 60
"""Of reciprocal rank fusion (Cormack, Clarke, Buettcher, SIGIR 2009): scores of generators do not compare, ranks do."""


@dataclass(frozen=True)
class Retrieval:
    """All that generators may look at."""

    catalogue: Catalogue
    models: (
        object  # with `.item_to_item`, `.two_tower`, `.rows_of_vectors`, `.shards` and `.vectors`, as `serving.models.Models`
    )
    eligible_N: np.ndarray
    trending_rows: np.ndarray  # all rows with a click, most clicked first, at this request's tick
    history: Sequence[str]  # what the reader watched before the log and clicked since, oldest first
    seeds: Sequence[str]  # the newest part of it
    followed_authors: Sequence[str]
    interests: Sequence[str] = ()  # of the history, as many notes as say which topics interest the reader
    promoted: Sequence[str] = ()  # what the settings promote
    geohash: str | None = None  # where the request comes from, as finely as its caller says
    failed: list[str] = field(default_factory=list)  # parts of generators that did


@dataclass(frozen=True)
class Candidates:
    """C notes, each once, best recall first. row_C: their rows of the catalogue. share_CG: what each of the G generators added
    to a note's score, 0 where it did not bring the note."""

    catalogue: Catalogue
    generators: tuple[str, ...]
    row_C: np.ndarray
    recall_score_C: np.ndarray
    share_CG: np.ndarray

    def __len__(self) -> int:
        return len(self.row_C)

    @cached_property
    def note_ids(self) -> list[str]:
        return [self.catalogue.note_ids[row] for row in self.row_C.tolist()]

    @cached_property
    def author_ids(self) -> list[str | None]:
        return [self.catalogue.author_ids[row] for row in self.row_C.tolist()]

    @property
    def sources(self) -> list[tuple[str, ...]]:
        return [self.sources_of(position) for position in range(len(self))]

    def sources_of(self, position: int) -> tuple[str, ...]:
        """The generators that brought a candidate, in the order of what each added to its score."""
        shares_G = self.share_CG[position]
        return tuple(self.generators[place] for place in np.argsort(-shares_G, kind="stable") if shares_G[place] > 0)

    def take(self, order: np.ndarray) -> "Candidates":
        """The candidates at these positions, in this order."""
        return Candidates(self.catalogue, self.generators, self.row_C[order], self.recall_score_C[order], self.share_CG[order])


def trending(request: Retrieval, limit: int) -> np.ndarray:
    """Notes clicked most in the day before this tick."""
    return request.trending_rows[request.eligible_N[request.trending_rows]][:limit]


def fresh(request: Retrieval, limit: int) -> np.ndarray:
    """Notes created most recently, or first seen most recently where the creation time is unknown."""
    rows = request.catalogue.rows_by_freshness
    return rows[request.eligible_N[rows]][:limit]


def topics(request: Retrieval, limit: int) -> np.ndarray:
    """Notes of the topics that this reader reads, the most clicked of each first: every topic in proportion to its share of the
    reader's newest history, interleaved."""
    of_topic = Counter(topic for note_id in request.interests if (topic := request.catalogue.topic_of(note_id)) is not None)
    if not of_topic:
        return np.empty(0, dtype=np.int64)
    codes, catalogue = [request.catalogue.topic_codes[topic] for topic in of_topic], request.catalogue
    weight_T = np.zeros(len(catalogue.topic_codes) + 1)
    weight_T[codes] = list(of_topic.values())
    rows = trending(request, len(catalogue))
    code_R = catalogue.topic_code_N[rows]
    rows, code_R = rows[weight_T[code_R] > 0], code_R[weight_T[code_R] > 0]
    by_topic = np.argsort(code_R, kind="stable")
    place_R = np.empty(len(rows))
    place_R[by_topic] = _place_in_run(code_R[by_topic])
    return rows[np.argsort((place_R + 0.5) / weight_T[code_R], kind="stable")][:limit]


def item_to_item(request: Retrieval, limit: int) -> np.ndarray:
    """Notes that others came to after what this reader came to last."""
    if not request.seeds:
        return np.empty(0, dtype=np.int64)
    neighbours = request.models.item_to_item.neighbours(list(request.seeds), limit * 2)  # type: ignore[attr-defined]
    rows = [request.catalogue.row_of[note_id] for note_id, _ in neighbours if note_id in request.catalogue.row_of]
    rows_C = np.array(rows, dtype=np.int64)
    return rows_C[request.eligible_N[rows_C]][:limit]


def two_tower(request: Retrieval, limit: int) -> np.ndarray:
    """The largest dot products of the reader's vector with those of all notes the model knows."""
    if not request.history:
        return np.empty(0, dtype=np.int64)
    tower = request.models.two_tower  # type: ignore[attr-defined]
    user_D = tower.user_vector(list(request.history))
    if not user_D.any():  # the model knows none of these notes: every product would be 0
        return np.empty(0, dtype=np.int64)
    rows_V = request.models.rows_of_vectors  # type: ignore[attr-defined]
    usable_V = (rows_V >= 0) & request.eligible_N[rows_V]
    vectors = request.models.vectors  # type: ignore[attr-defined]
    if vectors is not None:
        return rows_V[vectors.best(user_D, usable_V, limit)]
    best, failed = request.models.shards.best(user_D, usable_V, limit)  # type: ignore[attr-defined]
    request.failed.extend(failed)
    return rows_V[best]


def followed_authors(request: Retrieval, limit: int) -> np.ndarray:
    """The newest notes of the authors this reader follows."""
    rows_of_author = request.catalogue.rows_of_author
    lists = [rows_of_author[author_id] for author_id in request.followed_authors if author_id in rows_of_author]
    if not lists:
        return np.empty(0, dtype=np.int64)
    rows = np.concatenate(lists)
    rows = rows[request.eligible_N[rows]]
    return rows[np.argsort(-request.catalogue.freshness_us[rows].astype(np.float64), kind="stable")][:limit]


def nearby(request: Retrieval, limit: int) -> np.ndarray:
    """Notes around the place of the request, nearest first."""
    if request.geohash is None:
        return np.empty(0, dtype=np.int64)
    return request.catalogue.places.nearest(request.geohash, request.eligible_N, limit)


def promoted(request: Retrieval, limit: int) -> np.ndarray:
    """What the settings promote, in their order."""
    row_of = request.catalogue.row_of
    rows_C = np.array([row_of[note_id] for note_id in request.promoted if note_id in row_of], dtype=np.int64)
    return rows_C[request.eligible_N[rows_C]][:limit]


GENERATORS: Mapping[str, Callable[[Retrieval, int], np.ndarray]] = {
    "followed_authors": followed_authors,
    "item_to_item": item_to_item,
    "two_tower": two_tower,
    "trending": trending,
    "fresh": fresh,
    "topics": topics,
    "nearby": nearby,
    "promoted": promoted,
}


def _never_late(num_candidates: int) -> bool:
    return False


def retrieve(
    request: Retrieval, limits: Mapping[str, int], is_late: Callable[[int], bool] = _never_late
) -> tuple[Candidates, list[str], bool]:
    """The union of the generators named in `limits`, each note once; the names of generators that failed; whether some were not
    asked, because with as many notes as there were it had become late. They are asked in the order of `limits`.

    A note's sources stand in the order of what each added to its score.
    recall_score is the sum over a note's sources of 1 / (60 + rank): higher is better, and more sources are better.
    """
    found: dict[str, np.ndarray] = {}
    failed: list[str] = request.failed
    is_cut = False
    for name, limit in limits.items():
        if found and is_late(len(np.unique(np.concatenate(list(found.values()))))):
            is_cut = True
            break
        try:
            found[name] = _first_of_each(GENERATORS[name](request, int(limit)))
        except Exception:  # one generator's failure costs its notes, never the page
            log.exception("generator %s failed; the feed goes on without it", name)
            failed.append(name)
    return _union(request.catalogue, found), failed, is_cut


def _union(catalogue: Catalogue, found: Mapping[str, np.ndarray]) -> Candidates:
    rows = np.concatenate([np.empty(0, np.int64), *found.values()])
    shares = [1.0 / (RANK_DAMPING + 1 + np.arange(len(of_one))) for of_one in found.values()]
    row_C, place = np.unique(rows, return_inverse=True)
    share_CG = np.zeros((len(row_C), len(found)))
    share_CG[place, np.repeat(np.arange(len(found)), [len(of_one) for of_one in found.values()])] = np.concatenate(
        [np.empty(0), *shares]
    )
    score_C = np.zeros(len(row_C))
    for generator in range(len(found)):
        score_C += share_CG[:, generator]
    order = np.argsort(-score_C, kind="stable")
    return Candidates(catalogue, tuple(found), row_C[order], score_C[order], share_CG[order])


def _first_of_each(rows: np.ndarray) -> np.ndarray:
    """The rows, each where it comes first."""
    return rows[np.sort(np.unique(rows, return_index=True)[1])]


def _place_in_run(sorted_R: np.ndarray) -> np.ndarray:
    """int64 [R]: 0, 1, 2 … within each run of equal values."""
    starts = np.flatnonzero(np.diff(sorted_R, prepend=-1))
    lengths = np.diff(np.append(starts, len(sorted_R)))
    return np.arange(len(sorted_R)) - np.repeat(starts, lengths)
