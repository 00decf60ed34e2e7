"""Block rows as DuckDB gives them, in the fewest bytes that the arrays need: a batch is dropped before the next one is read."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from warehouse.features.compute_arrays import block_index


class BlockRows:
    """Rows of a group's blocks. keys: dictionary arrays by key column; block, known: uint32 [R], as of `block_index`.

    batches: the keys, `block_us`, `known_us` (int64) and the columns. sums: integer columns without NULL. extremes: dtype by
    column.
    """

    def __init__(
        self,
        batches: Iterable[pa.RecordBatch],
        keys: Sequence[str],
        sums: Sequence[str],
        extremes: Mapping[str, type[np.generic]],
    ):
        encoded: dict[str, list[pa.Array]] = {key: [] for key in keys}
        block: list[np.ndarray] = []
        known: list[np.ndarray] = []
        self._values: dict[str, list[np.ndarray]] = {column: [] for column in (*sums, *extremes)}
        self._valid: dict[str, list[np.ndarray]] = {column: [] for column in extremes}
        for batch in batches:
            for key, parts in encoded.items():
                parts.append(batch[key].dictionary_encode())
            block.append(block_index(batch["block_us"].to_numpy()).astype(np.uint32))
            known.append(block_index(batch["known_us"].to_numpy()).astype(np.uint32))
            for column in sums:
                self._values[column].append(np.array(batch[column].to_numpy(zero_copy_only=False), np.int64))
            for column, of in extremes.items():
                self._values[column].append(np.array(batch[column].fill_null(0).to_numpy(zero_copy_only=False), of))
                self._valid[column].append(batch[column].is_valid().to_numpy(zero_copy_only=False))
        none = pa.array([], pa.string()).dictionary_encode()
        self.keys = [pa.chunked_array(parts or [none]).unify_dictionaries() for parts in encoded.values()]
        self.block, self.known = _joined(block, np.uint32), _joined(known, np.uint32)

    def take(self, column: str) -> np.ndarray:
        """[R]: the column's values, 0 for NULL, which the rows then forget."""
        return _joined(self._values.pop(column), np.int64)

    def take_valid(self, column: str) -> np.ndarray:
        """bool [R]: where an extreme is not NULL, which the rows then forget."""
        return _joined(self._valid.pop(column), np.bool_)


def _joined(parts: list[np.ndarray], of: type[np.generic]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, of)
