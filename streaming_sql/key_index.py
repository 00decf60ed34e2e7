"""Dense row ids for the keys of one feature group: the n-th key ever seen is row n. Grows, never forgets.

One thread adds; any number look up.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Key = tuple[str, ...]


class KeyIndex:
    """Key → row id."""

    def __init__(self, key_columns: Sequence[str]):
        self._columns = tuple(key_columns)
        self._row_of: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._row_of)

    def find(self, keys: Iterable[Key]) -> np.ndarray:
        """int64 [N]: each key's row, -1 if it was never seen."""
        get = self._row_of.get
        return np.fromiter((get(tuple(key), -1) for key in keys), dtype=np.int64)

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
        rows = [self._row_of.setdefault(key, len(self._row_of)) for key in zip(*reversed(parts), strict=True)]
        return np.array(rows, dtype=np.int64)[place] if rows else np.zeros(0, dtype=np.int64)
