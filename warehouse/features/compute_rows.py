"""Block rows as DuckDB gives them, in the fewest bytes that the arrays need: a batch is dropped before the next one is read."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from warehouse.features.compute_arrays import block_index


class BlockRows:
    """num_rows rows of a group's blocks. block, known: uint32 [R], as of `block_index`.

    batches: the keys, `block_us`, `known_us` (int64) and the columns. sums: integer columns without NULL. extremes: dtype by
    column.
    """

    def __init__(
        self,
        num_rows: int,
        batches: Iterable[pa.RecordBatch],
        keys: Sequence[str],
        sums: Sequence[str],
        extremes: Mapping[str, type[np.generic]],
    ):
        encoded: dict[str, list[pa.Array]] = {key: [] for key in keys}
        self.block, self.known = np.empty(num_rows, np.uint32), np.empty(num_rows, np.uint32)
        types = dict.fromkeys(sums, np.int64) | dict(extremes)
        self._values = {column: np.empty(num_rows, of) for column, of in types.items()}
        self._valid = {column: np.empty(num_rows, np.bool_) for column in extremes}
        at = 0
        for batch in batches:
            here = slice(at, at + batch.num_rows)
            at += batch.num_rows
            for key, parts in encoded.items():
                parts.append(batch[key].dictionary_encode())
            self.block[here] = block_index(batch["block_us"].to_numpy())
            self.known[here] = block_index(batch["known_us"].to_numpy())
            for column, values in self._values.items():
                values[here] = batch[column].fill_null(0).to_numpy(zero_copy_only=False)
            for column, valid in self._valid.items():
                valid[here] = batch[column].is_valid().to_numpy(zero_copy_only=False)
        assert at == num_rows
        none = pa.array([], pa.string()).dictionary_encode()
        self._keys = [pa.chunked_array(parts or [none]).unify_dictionaries() for parts in encoded.values()]

    def take_keys(self) -> list[pa.ChunkedArray]:
        """The key columns, as dictionary arrays, which the rows then forget."""
        keys, self._keys = self._keys, []
        return keys

    def take(self, column: str) -> np.ndarray:
        """[R]: the column's values, 0 for NULL, which the rows then forget."""
        return self._values.pop(column)

    def take_valid(self, column: str) -> np.ndarray:
        """bool [R]: where an extreme is not NULL, which the rows then forget."""
        return self._valid.pop(column)
