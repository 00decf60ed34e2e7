"""Maps from an entry to numbers (top_k, sketches, buckets): stored per block, added up per key when read.

Entries are int64: the bucket or register of a sketch itself, else the code of a text (`text_codes`). Shape letters: R stored
entries, E entries found, C numbers of an entry, N keys asked for, G (key, entry) groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from streaming_sql.ragged import Instants, laid_out, opens, places, stretches
from streaming_sql.text_codes import TextCodes
from warehouse.features import sketches
from warehouse.features.measures import Measure


@dataclass(frozen=True)
class MapShape:
    """How a measure's maps are stored: the columns of blocks, and for each its type and how it combines."""

    measure: Measure
    columns: tuple[str, ...]
    dtypes: tuple[type, ...]
    combines: tuple[np.ufunc, ...]
    has_texts: bool

    @classmethod
    def of(cls, measure: Measure) -> "MapShape":
        number = np.float64 if measure.type == "double" else np.int64
        dtypes: tuple[type, ...] = (number, np.int64) if measure.aggregation == "avg" else (np.int64,)
        if measure.aggregation in ("sum", "min", "max"):
            dtypes = (number,)
        combine = {"min": np.minimum, "max": np.maximum, "approx_count_distinct": np.maximum}.get(measure.aggregation, np.add)
        has_texts = measure.aggregation not in ("approx_quantile", "approx_count_distinct")
        return cls(measure, measure.columns, dtypes, (combine,) * len(measure.columns), has_texts)


@dataclass(frozen=True)
class EntryMaps:
    """By (place, entry), each once. Arrays are never written after construction."""

    place: np.ndarray
    entry: np.ndarray
    values: tuple[np.ndarray, ...]

    @property
    def nbytes(self) -> int:
        return self.place.nbytes + self.entry.nbytes + sum(column.nbytes for column in self.values)

    @classmethod
    def of_lists(
        cls, shape: MapShape, row: np.ndarray, block_start: np.ndarray, columns: Sequence[pa.ChunkedArray], codes: TextCodes
    ) -> "EntryMaps":
        """From the measure's block columns: lists of (entry, value), one list per block row; NULL is empty."""
        arrays = [column.combine_chunks() if column.num_chunks != 1 else column.chunk(0) for column in columns]
        owner = pc.list_parent_indices(arrays[0]).to_numpy()
        structs = [array.flatten() for array in arrays]
        if any(not other.field("entry").equals(structs[0].field("entry")) for other in structs[1:]):
            raise ValueError(f"the columns {', '.join(shape.columns)} hold different entries")
        entries = pc.struct_field(structs[0], "entry")
        values = tuple(
            pc.struct_field(struct, "value").cast(pa.float64() if dtype is np.float64 else pa.int64()).to_numpy()
            for struct, dtype in zip(structs, shape.dtypes, strict=True)
        )
        numbers = codes.add(entries.cast(pa.string())) if shape.has_texts else entries.cast(pa.int64()).to_numpy()
        return cls.build(shape, places(row, block_start)[owner], numbers, values)

    @classmethod
    def build(cls, shape: MapShape, place: np.ndarray, entry: np.ndarray, values: Sequence[np.ndarray]) -> "EntryMaps":
        """Sorted, entries of the same place combined."""
        return cls(*_combined(shape, place, entry, values))

    @classmethod
    def merge(cls, shape: MapShape, parts: Sequence["EntryMaps"]) -> "EntryMaps":
        columns = zip(*(part.values for part in parts), strict=True)
        return cls.build(
            shape,
            np.concatenate([part.place for part in parts]),
            np.concatenate([part.entry for part in parts]),
            [np.concatenate(column) for column in columns],
        )

    def kept(self, keep: np.ndarray) -> "EntryMaps":
        """keep: bool [R]."""
        return EntryMaps(self.place[keep], self.entry[keep], tuple(column[keep] for column in self.values))

    def without(self, emptied: np.ndarray) -> "EntryMaps":
        """Less the entries of some blocks. emptied: int64, their places."""
        gone = np.isin(self.place, emptied)
        return self.kept(~gone) if gone.any() else self

    def found(self, row: np.ndarray, lower_us: Instants, upper_us: int) -> "Found":
        index, owner = laid_out(*stretches(self.place, row, lower_us, upper_us))
        return Found(owner, self.entry[index], tuple(column[index] for column in self.values))


@dataclass(frozen=True)
class Found:
    """Entries of keys. owner [E]: which of the N keys; once grouped, by (owner, entry), each once."""

    owner: np.ndarray
    entry: np.ndarray
    values: tuple[np.ndarray, ...]

    @classmethod
    def of_pairs(cls, shape: MapShape, pairs: Sequence[tuple[int, tuple[int, tuple]]]) -> "Found":
        """From (owner, (entry, values)) of single events."""
        return cls(
            np.array([owner for owner, _ in pairs], dtype=np.int64),
            np.array([entry for _, (entry, _) in pairs], dtype=np.int64),
            tuple(
                np.array([values[place] for _, (_, values) in pairs], dtype=dtype) for place, dtype in enumerate(shape.dtypes)
            ),
        )

    @classmethod
    def grouped(cls, shape: MapShape, parts: Sequence["Found"]) -> "Found":
        """Everything together, added up per (owner, entry) in one pass."""
        if not parts:
            return cls.of_pairs(shape, [])
        columns = zip(*(part.values for part in parts), strict=True)
        return cls(
            *_combined(
                shape,
                np.concatenate([part.owner for part in parts]),
                np.concatenate([part.entry for part in parts]),
                [np.concatenate(column) for column in columns],
            )
        )

    def edges(self, num_keys: int) -> np.ndarray:
        """int64 [N + 1]: where each key's entries begin, once grouped."""
        return np.searchsorted(self.owner, np.arange(num_keys + 1))


def _combined(
    shape: MapShape, group: np.ndarray, entry: np.ndarray, values: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    order = np.lexsort((entry, group))
    group, entry = group[order], entry[order]
    first = opens(group, entry)
    return (
        group[first],
        entry[first],
        tuple(
            combine.reduceat(column[order], first) if len(first) else column
            for combine, column in zip(shape.combines, values, strict=True)
        ),
    )


def most_frequent(found: Found, num_keys: int, k: int, codes: TextCodes) -> list[list[str]]:
    """Each key's k texts with the largest counts, the largest first, ties in byte order."""
    edges, (counts,) = found.edges(num_keys), found.values
    lists = []
    for low, high in pairwise(edges.tolist()):
        count, entry = counts[low:high], found.entry[low:high]
        if high - low > k:
            least = np.partition(count, high - low - k)[high - low - k]
            count, entry = count[count >= least], entry[count >= least]
        pairs = sorted(zip((-count).tolist(), codes.texts(entry.tolist()), strict=True))  # code points sort as their UTF-8 does
        lists.append([text for _, text in pairs[:k]])
    return lists


def buckets(found: Found, num_keys: int, is_average: bool, codes: TextCodes) -> list[dict[str, float]]:
    """Each key's map from a bucket's text to its number, in byte order of the texts."""
    numbers = found.values[0] / found.values[1] if is_average else found.values[0].astype(np.float64)
    edges, texts, values = found.edges(num_keys).tolist(), codes.texts(found.entry.tolist()), numbers.tolist()
    return [dict(sorted(zip(texts[low:high], values[low:high], strict=True))) for low, high in pairwise(edges)]


def quantiles(found: Found, num_keys: int, measure: Measure) -> np.ndarray:
    """float64 [N]: `sketches.quantile` of each key, NaN of nothing."""
    assert measure.q is not None
    assert measure.relative_error is not None
    edges, (counts,) = found.edges(num_keys), found.values
    through = np.cumsum(counts)
    before = np.append(0, through)[edges[:-1]]
    total = np.append(0, through)[edges[1:]] - before
    some = np.flatnonzero(total > 0)
    rank = np.floor(measure.q * (total[some] - 1)).astype(np.int64)
    bucket = found.entry[np.searchsorted(through, before[some] + rank, side="right")]
    middle = np.array(measure.bounds)[np.maximum(np.abs(bucket) - 1, 0)] * (1 + measure.relative_error)
    values = np.full(num_keys, np.nan)
    values[some] = np.sign(bucket) * middle
    return values


def distinct_counts(found: Found, num_keys: int) -> np.ndarray:
    """float64 [N]: `sketches.count_distinct` of each key, 0 of nothing."""
    (rank,) = found.values
    registers = sketches.REGISTERS
    held = np.bincount(found.owner, minlength=num_keys)
    empty = registers - held
    total = np.zeros(num_keys)
    np.add.at(total, found.owner, np.exp2(-rank.astype(np.float64)))
    raw = sketches.ALPHA * registers * registers / (empty + total)
    linear = registers * np.log(registers / np.maximum(empty, 1))
    return np.floor(np.where((raw <= 2.5 * registers) & (empty > 0), linear, raw) + 0.5)
