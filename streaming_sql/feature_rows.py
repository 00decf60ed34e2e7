"""Rows of a group's features by their places: a request names them at once, and copies the columns of those that it reads.

C candidates, F features, W wanted columns.
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
    """Candidate c has row place_C[c] of `held`; where that is below 0, row -1 - place_C[c] of `own`. place_C: int64."""

    held: FeatureMatrix
    place_C: np.ndarray
    own: FeatureMatrix | None = None
    stamp: int = 0
    """Above 0 where a row of `held` has the same values wherever this number comes again."""

    @property
    def names(self) -> tuple[str, ...]:
        return self.held.names

    def take(self, order: np.ndarray) -> "FeatureRows":
        return FeatureRows(self.held, self.place_C[order], self.own, self.stamp)

    def write(self, out_CW: np.ndarray, from_columns: np.ndarray, to_columns: np.ndarray) -> None:
        """Copies columns of the features to columns of out_CW, float64 or float32, contiguous. Columns: int64."""
        own = self.held if self.own is None else self.own
        values, own_values = (np.ascontiguousarray(matrix.values) for matrix in (self.held, own))
        _write(values, own_values, np.ascontiguousarray(self.place_C), from_columns, to_columns, out_CW)

    def matrix(self) -> FeatureMatrix:
        """A copy of the rows."""
        values_CF = np.empty((len(self.place_C), len(self.names)))
        columns = np.arange(len(self.names))
        self.write(values_CF, columns, columns)
        return FeatureMatrix(self.names, values_CF, self.sequences(), self.maps())

    def sequences(self) -> dict[str, list[list[str]]]:
        own = self.own.sequences if self.own else {}
        return {name: self._listed(rows, own.get(name, ())) for name, rows in self.held.sequences.items()}

    def maps(self) -> dict[str, list[dict[str, float]]]:
        own = self.own.maps if self.own else {}
        return {name: self._listed(rows, own.get(name, ())) for name, rows in self.held.maps.items()}

    def _listed(self, held: Sequence[Any], own: Sequence[Any]) -> list[Any]:
        return [held[place] if place >= 0 else own[-1 - place] for place in self.place_C.tolist()]


_VALUES, _PLACES = only_read(types.float64, 2), only_read(types.int64, 1)


@compiled([types.void(_VALUES, _VALUES, _PLACES, _PLACES, _PLACES, kind[:, ::1]) for kind in (types.float32, types.float64)])
def _write(
    values_RF: np.ndarray,
    own_RF: np.ndarray,
    place_C: np.ndarray,
    from_columns: np.ndarray,
    to_columns: np.ndarray,
    out_CW: np.ndarray,
) -> None:
    for c in range(len(place_C)):
        place = place_C[c]
        row_F = values_RF[place] if place >= 0 else own_RF[-1 - place]
        for column in range(len(from_columns)):
            out_CW[c, to_columns[column]] = row_F[from_columns[column]]
