"""Rows of a group's features by their places: a request names them at once, and copies the columns of those that it reads.

N rows named, C of them read, F features, W wanted columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import types

from streaming_sql.group_state import FeatureMatrix
from warehouse.compiled import compiled, only_read


@dataclass(frozen=True)
class FeatureRows:
    """Row n is row place_N[n] of `held`; where that is below 0, row -1 - place_N[n] of `own`. place_N: int64. Arrays are
    contiguous."""

    held: FeatureMatrix
    place_N: np.ndarray
    own: FeatureMatrix | None = None
    stamp_R: np.ndarray | None = None
    """int64, of the rows of `held`: above 0, and wherever a row has the same one again its values are the same."""

    @property
    def names(self) -> tuple[str, ...]:
        return self.held.names

    def write(self, n_C: np.ndarray, out_CW: np.ndarray, from_columns: np.ndarray, to_columns: np.ndarray) -> None:
        """Copies columns of rows n_C to columns of out_CW, float64 or float32, contiguous. n_C and columns: int64."""
        own = self.held if self.own is None else self.own
        _write(self.held.values, own.values, self.place_N, n_C, from_columns, to_columns, out_CW)

    def stamps(self, n_C: np.ndarray) -> np.ndarray:
        """int64 [C]: those of rows n_C, 0 where there is none."""
        place_C = self.place_N[n_C]
        if self.stamp_R is None:
            return np.zeros(len(place_C), dtype=np.int64)
        if self.own is None:
            return self.stamp_R[place_C]
        return np.where(place_C < 0, 0, self.stamp_R[np.maximum(place_C, 0)])

    def matrix(self, n_C: np.ndarray | None = None) -> FeatureMatrix:
        """A copy of rows n_C, by default of all."""
        n_C = np.arange(len(self.place_N)) if n_C is None else n_C
        values_CF = np.empty((len(n_C), len(self.names)))
        columns = np.arange(len(self.names))
        self.write(n_C, values_CF, columns, columns)
        return FeatureMatrix(self.names, values_CF, self.sequences(n_C), self.maps(n_C))

    def sequences(self, n_C: np.ndarray) -> dict[str, list[list[str]]]:
        own = self.own.sequences if self.own else {}
        return {name: self._listed(n_C, rows, own.get(name, ())) for name, rows in self.held.sequences.items()}

    def maps(self, n_C: np.ndarray) -> dict[str, list[dict[str, float]]]:
        own = self.own.maps if self.own else {}
        return {name: self._listed(n_C, rows, own.get(name, ())) for name, rows in self.held.maps.items()}

    def _listed(self, n_C: np.ndarray, held: Sequence[Any], own: Sequence[Any]) -> list[Any]:
        return [held[place] if place >= 0 else own[-1 - place] for place in self.place_N[n_C].tolist()]


_VALUES, _PLACES = only_read(types.float64, 2), only_read(types.int64, 1)


@compiled(
    [types.void(_VALUES, _VALUES, *(_PLACES,) * 4, out[:, ::1]) for out in (types.float32, types.float64)],
)
def _write(
    values_RF: np.ndarray,
    own_RF: np.ndarray,
    place_N: np.ndarray,
    n_C: np.ndarray,
    from_columns: np.ndarray,
    to_columns: np.ndarray,
    out_CW: np.ndarray,
) -> None:
    for c in range(len(n_C)):
        place = place_N[n_C[c]]
        row_F = values_RF[place] if place >= 0 else own_RF[-1 - place]
        for column in range(len(from_columns)):
            out_CW[c, to_columns[column]] = row_F[from_columns[column]]
