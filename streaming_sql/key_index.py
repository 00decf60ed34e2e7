"""Dense row ids for the keys of one feature group: the n-th key is row n, and a row whose key went is given to a later one.

One thread adds; any number look up. An index never forgets a key: `kept` gives another one that has, so that views of the past
read their own.
"""

from array import array
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Key = tuple[str, ...]
_BESIDE = 1 << 30
"""Rows from here on are of keys beside an index."""


class KeyIndex:
    """Key → row id."""

    def __init__(self, key_columns: Sequence[str]):
        self._columns = tuple(key_columns)
        self._row_of: dict[Any, int] = {}
        """By the key, or by its text where there is one column: a tuple would be one more object to look at."""
        self._is_single = len(self._columns) == 1
        self._key_of: list[Key | None] = []
        """By row; None where the row is free."""
        self._given = array("q")
        """Rows in the order in which they were given to the keys that are here."""
        self._free: list[int] = []
        self._rows_under: dict[str, list[int]] = {}
        """By the first of several columns."""

    def __len__(self) -> int:
        return len(self._given)

    def find(self, keys: Iterable[Key]) -> np.ndarray:
        """int64 [N]: each key's row, -1 if it was never seen."""
        found = (key for (key,) in keys) if self._is_single else map(tuple, keys)
        return np.fromiter(map(self._row_of.get, found, repeat(-1)), dtype=np.int64)

    def keys(self, start: int = 0) -> list[Key]:
        """The keys that are here, from the start-th on, in the order in which they came."""
        return [key for row in self._given[start:] if (key := self._key_of[row]) is not None]

    def rows(self, start: int = 0) -> np.ndarray:
        """int64: their rows."""
        return np.array(self._given[start:], dtype=np.int64)

    def keys_of(self, rows: np.ndarray) -> list[Key]:
        """The keys of these rows, none of which is free."""
        return [self._key_at(row) for row in rows.tolist()]

    def _key_at(self, row: int) -> Key:
        key = self._key_of[row]
        assert key is not None
        return key

    def extend(self, keys: Iterable[Key], rows: Iterable[int]) -> None:
        """Gives keys that are not here yet the rows that they have elsewhere. Not for an index that adds."""
        for key, row in zip(keys, rows, strict=True):
            self._key_of += [None] * (row + 1 - len(self._key_of))
            self._assign(key, row)

    def kept(self, rows: np.ndarray) -> "KeyIndex":
        """Another index with the keys of these rows alone (int64, ascending); the other rows are free."""
        index = KeyIndex(self._columns)
        index._key_of = [None] * len(self._key_of)
        for row in rows.tolist():
            index._assign(self._key_at(row), row)
        index.find_free()
        return index

    def find_free(self) -> None:
        """Rows that no key has are given to new ones from now on."""
        self._free = [row for row in range(len(self._key_of) - 1, -1, -1) if self._key_of[row] is None]

    def under(self, first: str) -> list[tuple[Key, int]]:
        """The keys of several columns that begin with this, each with its row, in the order in which they came."""
        return [(key, row) for row in tuple(self._rows_under.get(first, ())) if (key := self._key_of[row]) is not None]

    def _row(self, key: Key) -> int:
        row = self._row_of.get(key[0] if self._is_single else key)
        if row is None:
            row = self._free.pop() if self._free else len(self._key_of)
            if row == len(self._key_of):
                self._key_of.append(None)
            self._assign(key, row)
        return row

    def _assign(self, key: Key, row: int) -> None:
        self._key_of[row] = key
        self._given.append(row)
        self._row_of[key[0] if self._is_single else key] = row
        if not self._is_single:
            self._rows_under.setdefault(key[0], []).append(row)

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


class KeysBeside(KeyIndex):
    """The keys of another index, which others extend meanwhile, and more of its own with rows that the other never gives.

    A key that is here keeps its row, whatever row the other index gives it later.
    """

    def __init__(self, other: KeyIndex):
        super().__init__(other._columns)
        self._other = other

    def __len__(self) -> int:
        return len(self._other) + len(self._given)

    def find(self, keys: Iterable[Key]) -> np.ndarray:
        if not self._given:
            return self._other.find(keys)
        keys = list(keys)
        own = super().find(keys)
        return np.where(own >= 0, own + _BESIDE, self._other.find(keys))

    def _key_at(self, row: int) -> Key:
        return super()._key_at(row - _BESIDE) if row >= _BESIDE else self._other._key_at(row)

    def under(self, first: str) -> list[tuple[Key, int]]:
        own = {key: row + _BESIDE for key, row in super().under(first)}
        return [(key, row) for key, row in self._other.under(first) if key not in own] + list(own.items())

    def _row(self, key: Key) -> int:
        (row,) = self.find([key]).tolist()
        return row if row >= 0 else super()._row(key) + _BESIDE
