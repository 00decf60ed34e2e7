"""Dense row ids for the keys of one feature group: the n-th key ever seen is row n. Grows, never forgets.

One thread adds; any number look up.
"""

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Key = tuple[str, ...]


class KeyIndex:
    """Key → row id."""

    def __init__(self, key_columns: Sequence[str]):
        self._columns = tuple(key_columns)
        self._row_of: dict[Any, int] = {}
        """By the key, or by its text where there is one column: a tuple would be one more object to look at."""
        self._is_single = len(self._columns) == 1
        self._keys: list[Key] = []
        self._rows_under: dict[str, list[int]] = {}
        """By the first of several columns."""

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, keys: Iterable[Key]) -> np.ndarray:
        """int64 [N]: each key's row, -1 if it was never seen."""
        found = (key for (key,) in keys) if self._is_single else map(tuple, keys)
        return np.fromiter(map(self._row_of.get, found, repeat(-1)), dtype=np.int64)

    def keys(self, start: int = 0) -> list[Key]:
        """The keys of rows start, start + 1, …"""
        return self._keys[start:]

    def under(self, first: str) -> list[tuple[Key, int]]:
        """The keys of several columns that begin with this, each with its row, in the order of rows."""
        return [(self._keys[row], row) for row in tuple(self._rows_under.get(first, ()))]

    def extend(self, keys: Iterable[Key]) -> None:
        """Gives keys that are not here yet the next rows, in their order."""
        for key in keys:
            self._row(key)

    def _row(self, key: Key) -> int:
        held = key[0] if self._is_single else key
        row = self._row_of.get(held)
        if row is None:
            row = len(self._keys)
            self._keys.append(key)
            self._row_of[held] = row
            if not self._is_single:
                self._rows_under.setdefault(key[0], []).append(row)
        return row

    def add(self, table: pa.Table) -> np.ndarray:
        """int64 [R]: the row of each table row's key; keys not seen before get the next ids. Keys must not be null."""
        code = np.zeros(table.num_rows, dtype=np.int64)
        values_of_columns, sizes = [], []
        for name in self._columns:
            encoded = pc.dictionary_encode(table[name]).combine_chunks()
            if encoded.null_count:
                raise ValueError(f"key column {name} holds {encoded.null_count} nulls; a key is never null")
            values_of_columns.append(encoded.dictionary.to_pylist())
            sizes.append(max(len(encoded.dictionary), 1))
            code = code * sizes[-1] + encoded.indices.to_numpy()
        distinct, place = np.unique(code, return_inverse=True)
        parts = []
        for values, size in zip(reversed(values_of_columns), reversed(sizes), strict=True):
            parts.append([values[i] for i in (distinct % size).tolist()])
            distinct = distinct // size
        rows = [self._row(key) for key in zip(*reversed(parts), strict=True)]
        return np.array(rows, dtype=np.int64)[place] if rows else np.zeros(0, dtype=np.int64)
