"""Search among the vectors of notes, in shards: exact products, or an HNSW graph where there are so many that it is worth it.

A shard is a run of consecutive vectors. Each answers with its best and their exact scores, so the merge is exact: exact shards
give what one search of everything gives. A shard that fails costs its notes and is named; the others answer.

V vectors, D width.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Protocol

import numpy as np

from models_ml.vector_search import OVERFETCH, graph_of

log = logging.getLogger(__name__)

_SAMPLED_EVERY = 32
"""Scores, of which one is looked at to guess how large the largest are."""
Found = tuple[np.ndarray, np.ndarray]
"""Rows, best first, and their scores."""


class Shard(Protocol):
    def best(self, user_D: np.ndarray, usable_V: np.ndarray, limit: int) -> Found: ...


class Exact:
    """Every product, and a partition. The vectors are kept by dimension: a product with one reader is then a sum of D long
    rows, which takes a third of the time."""

    def __init__(self, vectors_VD: np.ndarray):
        self._vectors_DV = np.ascontiguousarray(vectors_VD.T)

    def best(self, user_D: np.ndarray, usable_V: np.ndarray, limit: int) -> Found:
        """The usable rows by their product with user_D, largest first, ties by row."""
        return _best(user_D @ self._vectors_DV, usable_V, limit)


class Hnsw:
    """An approximate neighbour graph over vectors that never change. What it finds of what `Exact` does, training prints.

    Another set of vectors is another index, and who holds this one keeps it until its requests are done.
    """

    def __init__(self, vectors_VD: np.ndarray):
        self._vectors_VD = vectors_VD
        self._graph = graph_of(vectors_VD)

    def best(self, user_D: np.ndarray, usable_V: np.ndarray, limit: int) -> Found:
        """As `Exact.best`, but for neighbours that the graph did not reach. Asks for more while the filters leave too few, and
        looks at everything when that has become the cheaper way."""
        wanted = min(limit, int(usable_V.sum()))
        asked = OVERFETCH * limit
        while asked < len(self._vectors_VD) // 4:
            rows = np.sort(self._graph.search(user_D, asked).keys.astype(np.int64))
            rows = rows[usable_V[rows]]
            if len(rows) >= wanted:
                scores = self._vectors_VD[rows] @ user_D
                order = largest(scores, limit)
                return rows[order], scores[order]
            asked *= 2
        return _best(self._vectors_VD @ user_D, usable_V, limit)


class ShardedVectors:
    """All vectors, in `num_shards` shards; graphs where there are at least `hnsw_from` vectors in all."""

    def __init__(self, vectors_VD: np.ndarray, num_shards: int = 1, hnsw_from: int = 1 << 62):
        kind = Hnsw if len(vectors_VD) >= hnsw_from else Exact
        edges = np.linspace(0, len(vectors_VD), num_shards + 1).astype(np.int64)
        self._edges = edges
        self.shards: list[Shard] = [kind(vectors_VD[start:end]) for start, end in pairwise(edges)]
        self._pool = ThreadPoolExecutor(num_shards - 1, thread_name_prefix="shards") if num_shards > 1 else None

    def best(self, user_D: np.ndarray, usable_V: np.ndarray, limit: int) -> tuple[np.ndarray, list[str]]:
        """int64: usable rows by their product with user_D, largest first, ties by row, at most `limit`; and the names of the
        shards that failed."""
        asked: list[tuple[int, Shard, np.ndarray]] = [
            (number, shard, usable_V[self._edges[number] : self._edges[number + 1]]) for number, shard in enumerate(self.shards)
        ]
        later: Sequence[Future[Found]] = (
            [self._pool.submit(shard.best, user_D, usable, limit) for _, shard, usable in asked[1:]] if self._pool else []
        )
        rows, scores, failed = [np.empty(0, np.int64)], [np.empty(0)], []
        for number, shard, usable in asked:
            try:
                found = shard.best(user_D, usable, limit) if number == 0 else later[number - 1].result()
            except Exception:  # one shard's failure costs its notes, never the page
                log.exception("shard %d of the vectors failed; retrieval goes on without it", number)
                failed.append(f"two_tower_shard_{number}")
                continue
            rows.append(found[0] + self._edges[number])
            scores.append(found[1])
        if len(self.shards) == 1:
            return rows[-1], failed
        all_rows, all_scores = np.concatenate(rows), np.concatenate(scores)
        return all_rows[np.lexsort((all_rows, -all_scores))][:limit], failed


def largest(values_N: np.ndarray, limit: int) -> np.ndarray:
    """Positions of the largest values, largest first; ties by position, so that a page does not depend on luck."""
    if limit <= 0:
        return np.empty(0, dtype=np.int64)
    if limit < len(values_N):
        kth = np.partition(values_N, len(values_N) - limit)[len(values_N) - limit]
        pool = np.flatnonzero(values_N >= kth)
    else:
        pool = np.arange(len(values_N))
    return pool[np.argsort(-values_N[pool], kind="stable")][:limit]


def _best(scores_V: np.ndarray, usable_V: np.ndarray, limit: int) -> Found:
    rows = _promising(scores_V, usable_V, limit)
    rows = rows[largest(scores_V[rows], limit)]
    return rows, scores_V[rows]


def _promising(scores_V: np.ndarray, usable_V: np.ndarray, limit: int) -> np.ndarray:
    """Usable rows, ascending, with the `limit` largest scores among them: those above what a sample says is about twice as many
    as are wanted, or all where that turns out to be too few."""
    wanted = 2 * limit // _SAMPLED_EVERY + 16
    sample = scores_V[::_SAMPLED_EVERY]
    if 4 * wanted < len(sample):
        rows = np.flatnonzero(scores_V >= np.partition(sample, len(sample) - wanted)[len(sample) - wanted])
        rows = rows[usable_V[rows]]
        if len(rows) >= limit:
            return rows
    return np.flatnonzero(usable_V)
