"""Search among the vectors of notes, in shards: exact products, or an HNSW graph where there are so many that it is worth it.

A shard is a run of consecutive vectors. Each answers with its best and their exact scores, so the merge is exact: exact shards
give what one search of everything gives. A shard that fails costs its notes and is named; the others answer.

V vectors, D width.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Protocol

import numpy as np
from numba import types

from models_ml.ordering import largest_first
from models_ml.vector_search import OVERFETCH, graph_of
from warehouse.compiled import compiled, only_read

log = logging.getLogger(__name__)

_SAMPLED_EVERY = 32
"""Scores, of which one is looked at to guess how large the largest are."""
_LARGEST_CODE, _BLOCK, _STRIPS = 127, 64, 4
_MORE = 1.001
"""What the bound on rounding is widened by, for its own rounding."""
_ALL = -(2**31) - 1
"""Below any product of codes."""
Found = tuple[np.ndarray, np.ndarray]
"""Rows, best first, and their scores."""


class Shard(Protocol):
    def best(self, user_D: np.ndarray, eligible_N: np.ndarray, limit: int) -> Found: ...


class Exact:
    """The largest of all products. They are looked for by codes of 8 bits, which are a quarter of the bytes: where several
    processes search, how many bytes a search reads decides how long it takes. Only of vectors whose product could be among
    the largest, by the most that rounding can make it differ, is it then computed from the vectors themselves.

    note_V: int64, the note of each vector, -1 for none that may be shown; by default their own places.
    """

    def __init__(self, vectors_VD: np.ndarray, note_V: np.ndarray | None = None):
        vectors_VD = self._vectors_VD = np.ascontiguousarray(vectors_VD, np.float32)
        num_vectors, width = vectors_VD.shape
        self._note_V = np.arange(num_vectors) if note_V is None else np.ascontiguousarray(note_V, np.int64)
        self._step = float(np.abs(vectors_VD).max(initial=0.0)) / _LARGEST_CODE or 1.0
        codes_VD = np.rint(vectors_VD / self._step).astype(np.int8)
        self._error = max(map(_longest, _in_parts(vectors_VD, codes_VD, self._step)), default=0.0)
        self._longest = _longest(vectors_VD) + self._error
        self._most_user_code = min(32_767, (2**31 - 1) // (_LARGEST_CODE * max(width, 1)))
        # in strips, because memory that is read at several places at once comes faster, and in blocks of a width that the
        # compiler knows; both are filled up with zeros
        blocks, strip = -(-width // _BLOCK), -(-num_vectors // _STRIPS)
        filled = np.zeros((_STRIPS * strip, blocks * _BLOCK), np.int8)
        filled[:num_vectors, :width] = codes_VD
        self._codes_BSRD = np.ascontiguousarray(filled.reshape(_STRIPS, strip, blocks, _BLOCK).transpose(2, 0, 1, 3))

    def best(self, user_D: np.ndarray, eligible_N: np.ndarray, limit: int) -> Found:
        """The vectors of eligible notes by their product with user_D (float32), largest first, ties by place."""
        if limit <= 0 or not len(self._note_V):
            return np.empty(0, np.int64), np.empty(0, np.float32)
        user_D = np.ascontiguousarray(user_D, np.float32)
        rows = self._promising(user_D, eligible_N, limit)
        scores = _products(self._vectors_VD, user_D, rows)
        order = largest(scores, limit)
        return rows[order], scores[order]

    def _promising(self, user_D: np.ndarray, eligible_N: np.ndarray, limit: int) -> np.ndarray:
        """Vectors of eligible notes, ascending, the `limit` largest products among them."""
        user_step = float(np.abs(user_D).max()) / self._most_user_code or 1.0
        user_codes_D = np.rint(user_D / user_step).astype(np.int16)
        user_codes_BD = np.zeros((len(self._codes_BSRD), _BLOCK), np.int16)
        user_codes_BD.reshape(-1)[: len(user_D)] = user_codes_D
        product_V = np.empty(self._codes_BSRD.shape[1:3], np.int32)
        _coarse_products(self._codes_BSRD, user_codes_BD, product_V)
        product_V = product_V.reshape(-1)[: len(self._note_V)]
        # |u v - u' v'| <= |u| |v - v'| + |u - u'| |v'|, of rounded u' and v' (Cauchy and Schwarz)
        user_error = float(np.linalg.norm(user_D - user_codes_D * np.float32(user_step)))
        off_by = float(np.linalg.norm(user_D)) * self._error + user_error * self._longest
        margin = int(2 * off_by * _MORE / (self._step * user_step)) + 1
        least = _guess(product_V, limit)
        while True:
            rows = _at_least(product_V, least, self._note_V, eligible_N)
            if len(rows) < limit and least > _ALL:
                least = _ALL  # few of those are eligible
                continue
            if len(rows) <= limit:
                return rows
            products = product_V[rows]
            needed = int(np.partition(products, len(rows) - limit)[len(rows) - limit]) - margin
            if needed >= least:
                return rows[products >= needed]
            least = needed  # there may be more of them below the guess


class Hnsw:
    """An approximate neighbour graph over vectors that never change. What it finds of what `Exact` does, training prints.

    Another set of vectors is another index, and who holds this one keeps it until its requests are done.
    """

    def __init__(self, vectors_VD: np.ndarray, note_V: np.ndarray | None = None):
        self._vectors_VD = vectors_VD
        self._note_V = np.arange(len(vectors_VD)) if note_V is None else np.ascontiguousarray(note_V, np.int64)
        self._graph = graph_of(vectors_VD)

    def best(self, user_D: np.ndarray, eligible_N: np.ndarray, limit: int) -> Found:
        """As `Exact.best`, but for neighbours that the graph did not reach. Asks for more while the filters leave too few, and
        looks at everything when that has become the cheaper way."""
        usable_V = usable(self._note_V, eligible_N)
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

    def __init__(self, vectors_VD: np.ndarray, num_shards: int = 1, hnsw_from: int = 1 << 62, note_V: np.ndarray | None = None):
        """note_V: int64, the note of each vector, -1 for none; by default their own places."""
        kind = Hnsw if len(vectors_VD) >= hnsw_from else Exact
        note_V = np.arange(len(vectors_VD)) if note_V is None else note_V
        edges = np.linspace(0, len(vectors_VD), num_shards + 1).astype(np.int64)
        self._edges = edges
        self.shards: list[Shard] = [kind(vectors_VD[start:end], note_V[start:end]) for start, end in pairwise(edges)]
        self._pool = ThreadPoolExecutor(num_shards - 1, thread_name_prefix="shards") if num_shards > 1 else None

    def best(self, user_D: np.ndarray, eligible_N: np.ndarray, limit: int) -> tuple[np.ndarray, list[str]]:
        """int64: vectors of eligible notes by their product with user_D, largest first, ties by place, at most `limit`; and the
        names of the shards that failed."""
        later: Sequence[Future[Found]] = (
            [self._pool.submit(shard.best, user_D, eligible_N, limit) for shard in self.shards[1:]] if self._pool else []
        )
        rows, scores, failed = [np.empty(0, np.int64)], [np.empty(0)], []
        for number, shard in enumerate(self.shards):
            try:
                found = shard.best(user_D, eligible_N, limit) if number == 0 else later[number - 1].result()
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
    return pool[largest_first(values_N[pool].astype(np.float64), pool)][:limit]


def _guess(product_V: np.ndarray, limit: int) -> int:
    """A product that about twice as many as are wanted reach, by a sample; `_ALL` where that would not be far from all."""
    wanted, sample = 2 * limit // _SAMPLED_EVERY + 16, product_V[::_SAMPLED_EVERY]
    if 4 * wanted >= len(sample):
        return _ALL
    return int(np.partition(sample, len(sample) - wanted)[len(sample) - wanted])


def _best(scores_V: np.ndarray, usable_V: np.ndarray, limit: int) -> Found:
    rows = np.flatnonzero(usable_V)
    rows = rows[largest(scores_V[rows], limit)]
    return rows, scores_V[rows]


def _longest(vectors_VD: np.ndarray) -> float:
    return float(np.linalg.norm(vectors_VD, axis=1).max(initial=0.0))


def _in_parts(vectors_VD: np.ndarray, codes_VD: np.ndarray, step: float) -> Iterator[np.ndarray]:
    """What rounding took away, some vectors at a time."""
    for start in range(0, len(vectors_VD), 65_536):
        some = slice(start, start + 65_536)
        yield vectors_VD[some] - codes_VD[some] * np.float32(step)


_NOTES, _MASK = only_read(types.int64), only_read(types.boolean)


@compiled(types.void(only_read(types.int8, 4), types.int16[:, ::1], types.int32[:, ::1]))
def _coarse_products(codes_BSRD, user_codes_BD, product_SR):
    """Writes the products of codes. The numbers are _STRIPS and _BLOCK: only with a width that it knows does the compiler use
    vector instructions."""
    for strip in range(4):
        for row in range(codes_BSRD.shape[2]):
            product_SR[strip, row] = 0
    for block in range(codes_BSRD.shape[0]):
        for row in range(codes_BSRD.shape[2]):
            for strip in range(4):
                product = np.int32(0)
                for place in range(64):
                    product += np.int32(codes_BSRD[block, strip, row, place]) * np.int32(user_codes_BD[block, place])
                product_SR[strip, row] += product


@compiled(types.int64[::1](only_read(types.int32), types.int64, _NOTES, _MASK))
def _at_least(product_V, least, note_V, eligible_N):
    """Vectors of eligible notes whose products reach `least`, ascending."""
    rows, count = np.empty(len(product_V), np.int64), 0
    for row, product in enumerate(product_V):
        if product >= least and note_V[row] >= 0 and eligible_N[note_V[row]]:
            rows[count] = row
            count += 1
    return rows[:count].copy()


@compiled(types.boolean[::1](_NOTES, _MASK))
def usable(note_V, eligible_N):
    """bool [V]: vectors of eligible notes; a note of -1 is none."""
    usable_V = np.empty(len(note_V), np.bool_)
    for vector, note in enumerate(note_V):
        usable_V[vector] = note >= 0 and eligible_N[note]
    return usable_V


@compiled(
    types.float32[::1](only_read(types.float32, 2), only_read(types.float32), only_read(types.int64)), fastmath={"reassoc"}
)
def _products(vectors_VD, user_D, rows):
    """float32, in the same order of additions for every row."""
    products = np.empty(len(rows), np.float32)
    for place, row in enumerate(rows):
        product = np.float32(0)
        for column in range(vectors_VD.shape[1]):
            product += vectors_VD[row, column] * user_D[column]
        products[place] = product
    return products
