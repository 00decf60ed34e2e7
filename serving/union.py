"""The union of what several generators found, each note once, compiled.

Shape letters: G generators, R rows that one of them gave, K notes of the union as they come, C of them in order of recall.
"""

import numpy as np
from numba import types

from models_ml.ordering import largest_first
from warehouse.compiled import compiled, only_read

RANK_DAMPING = 60
"""Of reciprocal rank fusion (Cormack, Clarke, Buettcher, SIGIR 2009): scores of generators do not compare, ranks do."""


class Union:
    """Holds at most `most_rows` notes of `num_generators`."""

    def __init__(self, most_rows: int, num_generators: int):
        size = 8
        while size < 2 * most_rows:
            size *= 2
        self._place_H = np.full(size, -1)  # by the row's hash
        self._row_K = np.empty(most_rows, np.int64)
        self._score_K = np.zeros(most_rows)
        self._share_KG = np.zeros((most_rows, num_generators), np.float32)
        self.generators: list[str] = []
        self.num_notes = 0

    def add(self, name: str, row_R: np.ndarray) -> None:
        """What one more generator found, best first. A row that it gives twice counts where it comes first. Raises ValueError
        above `most_rows` in all."""
        row_R = np.ascontiguousarray(row_R, np.int64)
        if self.num_notes + len(row_R) > len(self._row_K):
            raise ValueError(f"{name} found {len(row_R)} notes, above its limit: the union holds {len(self._row_K)} in all")
        tables = self._place_H, self._row_K, self._score_K, self._share_KG
        self.num_notes = _add(row_R, len(self.generators), self.num_notes, *tables)
        self.generators.append(name)

    def ranked(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows int64 [C], recall scores float64 [C], each generator's share of them, float32
        [C, G]), best first, ties by row."""
        row_K, score_K = self._row_K[: self.num_notes], self._score_K[: self.num_notes]
        order_C = largest_first(score_K, row_K)
        share_CG = np.ascontiguousarray(self._share_KG.take(order_C, axis=0)[:, : len(self.generators)])
        return row_K[order_C], score_K[order_C], share_CG


@compiled(
    types.int64(
        *(only_read(types.int64, 1), types.int64, types.int64),
        *(types.int64[::1], types.int64[::1], types.float64[::1], types.float32[:, ::1]),
    )
)
def _add(row_R, generator, num_notes, place_H, row_K, score_K, share_KG):
    """Writes a generator's rows into the tables; returns the number of notes that there are then."""
    rank = RANK_DAMPING
    for row in row_R:
        at = (row * 0x9E3779B1) & (len(place_H) - 1)
        while place_H[at] >= 0 and row_K[place_H[at]] != row:
            at = (at + 1) & (len(place_H) - 1)
        if place_H[at] < 0:
            place_H[at], row_K[num_notes] = num_notes, row
            num_notes += 1
        place = place_H[at]
        if share_KG[place, generator] == 0.0:
            rank += 1
            share = 1.0 / rank
            share_KG[place, generator] = share
            score_K[place] += share
    return num_notes
