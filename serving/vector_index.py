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
from usearch.index import Index

log = logging.getLogger(__name__)

CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH = 16, 64, 256
OVERFETCH = 2
"""Times the wanted number that a graph is asked for at first; twice that while the filters leave too few."""
Found = tuple[np.ndarray, np.ndarray]
"""Rows, best first, and their scores."""


class Shard(Protocol):
    def best(self, user_D: np.ndarray, usable_V: np.ndarray, limit: int) -> Found: ...


class Exact:
    """Every product, and a partition."""

    def __init__(self, vectors_VD: np.ndarray):
        self._vectors_VD = vectors_VD

    def best(self, user_D: np.ndarray, usable_V: np.ndarray, limit: int) -> Found:
        """The usable rows by their product with user_D, largest first, ties by row."""
        scores_V = np.where(usable_V, self._vectors_VD @ user_D, -np.inf)
        rows = largest(scores_V, limit)
        rows = rows[usable_V[rows]]
        return rows, scores_V[rows]


class Hnsw:
    """An approximate neighbour graph (Malkov and Yashunin, arXiv 1603.09320) over vectors that never change.

    Built by one thread: concurrent additions have lost vectors (usearch#735). Another set of vectors is another index, and who
    holds this one keeps it until its requests are done.
    """

    def __init__(self, vectors_VD: np.ndarray):
        self._vectors_VD = vectors_VD
        self._graph = Index(
            ndim=vectors_VD.shape[1],
            metric="ip",
            dtype="bf16",
            connectivity=CONNECTIVITY,
            expansion_add=EXPANSION_ADD,
            expansion_search=EXPANSION_SEARCH,
        )
        self._graph.add(np.arange(len(vectors_VD)), vectors_VD, threads=1)

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
        return Exact(self._vectors_VD).best(user_D, usable_V, limit)


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
    order = np.lexsort((pool, -values_N[pool].astype(np.float64)))
    return pool[order][:limit]
