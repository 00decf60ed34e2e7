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
from numba import types

from models_ml.ordering import largest_first
from serving.catalogue import Catalogue
from serving.hydrate import UserFeatures
from serving.union import Union
from serving.vector_index import usable
from warehouse.compiled import compiled, only_read

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retrieval:
    """All that generators may look at."""

    catalogue: Catalogue
    models: object  # with `.item_to_item`, `.rows_of_neighbours`, `.two_tower`, `.rows_of_vectors`, `.shards` and `.vectors`
    eligible_N: np.ndarray  # only lent, for the time of the request
    trending_rows: np.ndarray  # all rows with a click, most clicked first, at this request's tick
    history: Sequence[str]  # what the reader watched before the log and clicked since, oldest first
    user: UserFeatures
    user_attributes: str | None
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
        return self.sources_at(np.arange(len(self)))

    def sources_of(self, position: int) -> tuple[str, ...]:
        """The generators that brought a candidate, in the order of what each added to its score."""
        return self.sources_at(np.array([position]))[0]

    def sources_at(self, positions: np.ndarray) -> list[tuple[str, ...]]:
        """`sources_of` each of these."""
        shares = self.share_CG[positions].tolist()
        brought = [[(-share, place) for place, share in enumerate(share_G) if share > 0] for share_G in shares]
        return [tuple([self.generators[place] for _, place in sorted(brought_G)]) for brought_G in brought]

    def take(self, order: np.ndarray) -> "Candidates":
        """The candidates at these positions, in this order."""
        return Candidates(self.catalogue, self.generators, self.row_C[order], self.recall_score_C[order], self.share_CG[order])


def trending(request: Retrieval, limit: int) -> np.ndarray:
    """Notes clicked most in the day before this tick."""
    return _first_eligible(request.trending_rows, request.eligible_N, limit)


def fresh(request: Retrieval, limit: int) -> np.ndarray:
    """Notes created most recently, or first seen most recently where the creation time is unknown."""
    return _first_eligible(request.catalogue.rows_by_freshness, request.eligible_N, limit)


def topics(request: Retrieval, limit: int) -> np.ndarray:
    """Notes of the topics that this reader reads, the most clicked of each first: every topic in proportion to its share of the
    reader's newest history, interleaved."""
    of_topic = Counter(topic for note_id in request.interests if (topic := request.catalogue.topic_of(note_id)) is not None)
    if not of_topic:
        return np.empty(0, dtype=np.int64)
    codes, catalogue = [request.catalogue.topic_codes[topic] for topic in of_topic], request.catalogue
    weight_T = np.zeros(len(catalogue.topic_codes))
    weight_T[codes] = list(of_topic.values())
    rows = np.ascontiguousarray(request.trending_rows, np.int64)
    rows_R, key_R = _of_topics(rows, request.eligible_N, catalogue.topic_code_N, weight_T, limit)
    return rows_R[largest_first(-key_R, np.arange(len(key_R)))[:limit]]


def item_to_item(request: Retrieval, limit: int) -> np.ndarray:
    """Notes that others came to after what this reader came to last."""
    if not request.seeds:
        return np.empty(0, dtype=np.int64)
    places, _ = request.models.item_to_item.nearest(request.seeds, max(limit * 2, 1))  # type: ignore[attr-defined]
    rows_C = request.models.rows_of_neighbours[places]  # type: ignore[attr-defined]
    rows_C = rows_C[rows_C >= 0]
    return rows_C[request.eligible_N[rows_C]][:limit]


def two_tower(request: Retrieval, limit: int) -> np.ndarray:
    """The largest dot products of the reader's vector with those of all notes."""
    tower = request.models.two_tower  # type: ignore[attr-defined]
    user = request.user.pick(tower.user_features)
    user_D = tower.user_vector(list(request.history), user, request.user_attributes)
    if not user_D.any():  # the model knows nothing of the reader: every product would be 0
        return np.empty(0, dtype=np.int64)
    rows_V = request.models.rows_of_vectors  # type: ignore[attr-defined]
    vectors = request.models.vectors  # type: ignore[attr-defined]
    if vectors is not None:
        return rows_V[vectors.best(user_D, usable(rows_V, request.eligible_N), limit)]
    best, failed = request.models.shards.best(user_D, request.eligible_N, limit)  # type: ignore[attr-defined]
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
    union = Union(sum(max(int(limit), 0) for limit in limits.values()), len(limits))
    failed: list[str] = request.failed
    is_cut = False
    for name, limit in limits.items():
        if union.generators and is_late(union.num_notes):
            is_cut = True
            break
        try:
            union.add(name, GENERATORS[name](request, int(limit)))
        except Exception:  # one generator's failure costs its notes, never the page
            log.exception("generator %s failed; the feed goes on without it", name)
            failed.append(name)
    return Candidates(request.catalogue, tuple(union.generators), *union.ranked()), failed, is_cut


_INTS, _FLOATS, _MASK = (only_read(of) for of in (types.int64, types.float64, types.boolean))


@compiled(types.Tuple((types.int64[::1], types.float64[::1]))(_INTS, _MASK, _INTS, _FLOATS, types.int64))
def _of_topics(rows, eligible_N, topic_code_N, weight_T, limit):
    """(eligible rows of topics with a weight, in their order, the first `limit` of each topic; how far down each comes in its
    topic, for its topic's weight)."""
    number_T = np.zeros(len(weight_T), np.int64)
    open_topics = np.sum(weight_T > 0)
    most = min(len(rows), open_topics * limit)
    row_R, key_R, count = np.empty(most, np.int64), np.empty(most), 0
    for row in rows:
        if count == most:
            break
        topic = topic_code_N[row]
        if eligible_N[row] and topic >= 0 and weight_T[topic] > 0 and number_T[topic] < limit:
            row_R[count], key_R[count] = row, (number_T[topic] + 0.5) / weight_T[topic]
            number_T[topic] += 1
            count += 1
    return row_R[:count], key_R[:count]


def _first_eligible(rows: np.ndarray, eligible_N: np.ndarray, limit: int) -> np.ndarray:
    """The first `limit` of the rows that are eligible, looking no further down than it takes."""
    size = 2 * limit
    while True:
        head = rows[:size]
        found = head[eligible_N[head]]
        if len(found) >= limit or size >= len(rows):
            return found[:limit]
        size = 4 * size
