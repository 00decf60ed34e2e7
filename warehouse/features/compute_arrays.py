"""Window aggregates of many reads at once, on NumPy arrays: what `compute` runs where arrays are faster than SQL.

Knows nothing of files, lakes or declarations. Times are int64: 5-minute indexes (`us // 300_000_000`, biased to be positive)
for blocks, microseconds for events. A read asks about one key code; code -1 is a key that never occurred.

On-time rows are sorted by (key, block): a sum over a window is the difference of two prefix sums, a minimum is a range minimum.
Late rows are sorted by (key, known_at). With F(E, K) = sum of the rows with block < E and known_at <= K, a window is
F(upper, K) - F(lower, K), and F(E, K) is a prefix sum over the rows with known_at <= E (all of them lie before E) plus the few
rows in flight across the edge: block < E < known_at <= K. Those are looked for among rows of like delay, so that one event that
is days late does not widen the search for the many that are minutes late.

Shape letters: R rows, C columns, N reads, X pairs of a read and a row.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

FIVE_MINUTES_US = 300_000_000
_BIAS = 1 << 31
_SHIFT = 32
_CODE_AND_TIME_BITS = 62
_LARGEST = (1 << _SHIFT) - 3
PAIRS_AT_ONCE = 4_000_000
"""How many (read, row) pairs are laid out at a time; bounds memory, changes no value."""
_DELAYS = (12, 288, 1 << 40)
"""Classes of delay, in blocks: up to an hour, up to a day, longer."""
_CHUNK = 16


def block_index(instants_us: np.ndarray) -> np.ndarray:
    """Biased index of the 5-minute block that holds each instant (or that starts at it); 20,000 years either side of 1970."""
    return np.clip(instants_us // FIVE_MINUTES_US + _BIAS, 0, _LARGEST)


class KeyCodes:
    """Numbers for the distinct keys of a relation; composite keys are numbered as pairs, never concatenated."""

    def __init__(self, columns: list[pa.ChunkedArray]):
        self._values: list[pa.Array] = []
        self._pairs: list[np.ndarray] = []
        codes: np.ndarray | None = None
        for column in columns:
            encoded = column.combine_chunks().dictionary_encode()
            encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
            self._values.append(encoded.dictionary)
            here = encoded.indices.to_numpy(zero_copy_only=False)
            if codes is None:
                codes = here
            else:
                pairs = codes.astype(np.int64) * max(len(encoded.dictionary), 1) + here
                distinct, codes = np.unique(pairs, return_inverse=True)
                self._pairs.append(distinct)
        assert codes is not None
        self.codes = codes

    def look_up(self, columns: list[pa.Array]) -> np.ndarray:
        """int64 [N]: the number of each key, -1 where it is unknown."""
        codes: np.ndarray | None = None
        for at, column in enumerate(columns):
            found = pc.fill_null(pc.index_in(column, value_set=self._values[at]), -1)
            here = found.to_numpy(zero_copy_only=False).astype(np.int64)
            if codes is None:
                codes = here
                continue
            distinct = self._pairs[at - 1]
            pairs = np.where((codes < 0) | (here < 0), -1, codes * max(len(self._values[at]), 1) + here)
            places = np.searchsorted(distinct, pairs)
            known = places < len(distinct)
            known[known] = distinct[places[known]] == pairs[known]
            codes = np.where(known & (pairs >= 0), places, -1)
        assert codes is not None
        return codes


class Places:
    """Rows of a relation in the order (key code, time): where a time falls among a key's rows. Times are below 1 << shift."""

    def __init__(self, codes: np.ndarray, times: np.ndarray, shift: int = _SHIFT):
        places = codes.astype(np.int64) << shift | times
        self._shift = shift
        self.order = np.argsort(places)
        self._sorted = places[self.order]

    def before(self, codes: np.ndarray, times: np.ndarray) -> np.ndarray:
        """[N]: the number of rows that lie before (code, time); 0 for an unknown key, whatever the time."""
        return np.where(codes < 0, 0, np.searchsorted(self._sorted, np.maximum(codes, 0) << self._shift | times))

    def ties(self) -> np.ndarray:
        """Places of the rows that share their key and time with another; each such run is whole and in order."""
        same = self._sorted[1:] == self._sorted[:-1]
        return np.flatnonzero(np.append(same, False) | np.append(False, same))

    def place(self, at: np.ndarray) -> np.ndarray:
        return self._sorted[at]


class Instants:
    """Numbers for instants, in their order, that fit beside a key code: microseconds after the first, or ranks if those are too
    many. What lies before the first is 0, what lies after the last is past every number."""

    def __init__(self, instants_us: np.ndarray, num_codes: int):
        first, last = (int(instants_us.min()), int(instants_us.max())) if len(instants_us) else (0, 0)
        self._first_us, self._past = first, last - first + 1
        self.shift = self._past.bit_length()
        self._ranks = None
        if self.shift + num_codes.bit_length() > _CODE_AND_TIME_BITS:
            self._ranks, self.shift = np.unique(instants_us), _SHIFT

    def numbers(self, instants_us: np.ndarray) -> np.ndarray:
        if self._ranks is not None:
            return np.searchsorted(self._ranks, instants_us)
        return np.clip(instants_us, self._first_us, self._first_us + self._past) - self._first_us


def _prefix(value_R: np.ndarray, order: np.ndarray) -> np.ndarray:
    """[R + 1]: sums of the rows before each place, in the given order; they run on from key to key."""
    prefix = np.zeros(len(order) + 1, np.int64)
    np.cumsum(value_R.take(order), out=prefix[1:])
    return prefix


def pairs(starts: np.ndarray, ends: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows of each read's range [start, end), as (read [X], row [X]) in order of reads, some reads at a time."""
    lengths = np.maximum(ends - starts, 0)
    reads = np.flatnonzero(lengths)
    lengths, starts = lengths[reads], starts[reads]
    totals = np.cumsum(lengths)
    first = 0
    while first < len(reads):
        done = totals[first - 1] if first else 0
        last = max(int(np.searchsorted(totals, done + PAIRS_AT_ONCE, side="right")), first + 1)
        sizes = lengths[first:last]
        read_X = np.repeat(reads[first:last], sizes)
        offsets = np.cumsum(sizes) - sizes
        row_X = np.arange(len(read_X)) - np.repeat(offsets - starts[first:last], sizes)
        yield read_X, row_X
        first = last


def _runs(read_X: np.ndarray) -> np.ndarray:
    """Where each run of equal reads starts."""
    return np.flatnonzero(np.diff(read_X, prepend=-1))


def add_pairs(total_N: np.ndarray, read_X: np.ndarray, value_X: np.ndarray) -> None:
    """total[read] += value; read_X is sorted."""
    if len(read_X):
        runs = _runs(read_X)
        total_N[read_X[runs]] += np.add.reduceat(value_X, runs)


def _worst(dtype: np.dtype, is_max: bool) -> int | float:
    """What every value is better than, or equal to."""
    if dtype.kind == "f":
        return -np.inf if is_max else np.inf
    limits = np.iinfo(dtype)
    return limits.min if is_max else limits.max


@dataclass
class Extreme:
    """The least or the largest of some values per read; `found` tells an empty set from a value that equals the filling."""

    best_N: np.ndarray
    found_N: np.ndarray
    is_max: bool

    @classmethod
    def empty(cls, num_reads: int, dtype: np.dtype, is_max: bool) -> "Extreme":
        return cls(np.full(num_reads, _worst(dtype, is_max), dtype), np.zeros(num_reads, bool), is_max)

    def take(self, read_X: np.ndarray, value_X: np.ndarray) -> None:
        """Considers values, none of them NULL; read_X is sorted."""
        if not len(read_X):
            return
        better = np.maximum if self.is_max else np.minimum
        runs = _runs(read_X)
        at = read_X[runs]
        self.best_N[at] = better(self.best_N[at], better.reduceat(value_X, runs))
        self.found_N[at] = True

    def merge(self, other: "Extreme") -> None:
        better = np.maximum if self.is_max else np.minimum
        self.best_N = better(self.best_N, other.best_N)
        self.found_N |= other.found_N

    def array(self) -> pa.Array:
        return pa.array(self.best_N, mask=~self.found_N)


class RangeExtreme:
    """Least or largest value of any range of a column: chunks of 16 with running extremes from both ends, and a table of powers
    of two over whole chunks; 2R + R/16 log2(R/16) numbers."""

    def __init__(self, value_R: np.ndarray, valid_R: np.ndarray, is_max: bool):
        self.is_max = is_max
        self._better = np.maximum if is_max else np.minimum
        self._valid = np.concatenate(([0], np.cumsum(valid_R)))
        num_chunks = -(-max(len(value_R), 1) // _CHUNK)
        filled = np.full(num_chunks * _CHUNK, _worst(value_R.dtype, is_max), value_R.dtype)
        filled[: len(value_R)] = np.where(valid_R, value_R, filled[0])
        chunks = filled.reshape(num_chunks, _CHUNK)
        self._values = filled
        self._from_start = self._better.accumulate(chunks, axis=1).ravel()
        self._to_end = self._better.accumulate(chunks[:, ::-1], axis=1)[:, ::-1].ravel()
        self._levels = [self._better.reduce(chunks, axis=1)]
        width = 1
        while 2 * width <= num_chunks:
            below = self._levels[-1]
            self._levels.append(self._better(below[:-width], below[width:]))
            width *= 2

    def between(self, start_N: np.ndarray, end_N: np.ndarray) -> Extreme:
        """Over rows [start, end) of each read."""
        answer = Extreme.empty(len(start_N), self._values.dtype, self.is_max)
        answer.found_N = self._valid[end_N] > self._valid[start_N]
        reads = np.flatnonzero(answer.found_N)
        start, last = start_N[reads], end_N[reads] - 1
        first_chunk, last_chunk = start // _CHUNK, last // _CHUNK
        best = np.full(len(reads), _worst(self._values.dtype, self.is_max), self._values.dtype)
        wide = first_chunk < last_chunk
        best[wide] = self._better(self._to_end[start[wide]], self._from_start[last[wide]])
        narrow = np.flatnonzero(~wide)
        for step in range(_CHUNK):
            inside = narrow[start[narrow] + step <= last[narrow]]
            best[inside] = self._better(best[inside], self._values[start[inside] + step])
        between = last_chunk - first_chunk - 1
        for level, table in enumerate(self._levels):
            at = np.flatnonzero((between >= 1 << level) & (between < 2 << level))
            left = table[first_chunk[at] + 1]
            right = table[last_chunk[at] - (1 << level)]
            best[at] = self._better(best[at], self._better(left, right))
        answer.best_N[reads] = best
        return answer


class BlockArrays:
    """A group's 5-minute rows: on-time rows with prefix sums and range extremes, late rows by the tick that knows them.

    codes, block, known: integers [R]. sums_CR: C columns int64 [R] that add up, which are let go one by one. extremes: name ->
    (values [R], valid [R], is_max).
    """

    def __init__(
        self,
        codes: np.ndarray,
        block: np.ndarray,
        known: np.ndarray,
        sums_CR: Iterable[np.ndarray],
        extremes: dict[str, tuple[np.ndarray, np.ndarray, bool]],
    ):
        late = known > block + 1
        at = np.flatnonzero(~late) if late.any() else np.arange(len(codes))
        self._on_time = Places(codes[at], block[at])
        on_time = at[self._on_time.order]
        at = np.flatnonzero(late)
        self._late = Places(codes[at], known[at])
        at = at[self._late.order]
        self._late_block, self._late_known = block[at].astype(np.int64), known[at].astype(np.int64)
        self._prefix: list[np.ndarray] = []
        self._late_sums: list[np.ndarray] = []
        self._late_prefix: list[np.ndarray] = []
        for value in sums_CR:
            self._prefix.append(_prefix(value, on_time))
            self._late_sums.append(value[at])
            self._late_prefix.append(_prefix(value, at))
        self._ranges = {
            name: RangeExtreme(value[on_time], valid[on_time], is_max) for name, (value, valid, is_max) in extremes.items()
        }
        self._late_extremes = {name: (value[at], valid[at]) for name, (value, valid, _) in extremes.items()}
        self._in_flight = self._by_delay(codes[at])

    def _by_delay(self, codes: np.ndarray) -> list[tuple[int, np.ndarray, Places]]:
        """Late rows in classes of delay: (largest delay, rows, their places)."""
        delay = self._late_known - self._late_block
        classes = []
        least = 0
        for most in _DELAYS:
            at = np.flatnonzero((delay > least) & (delay <= most))
            if len(at):
                classes.append((int(delay[at].max()), at, Places(codes[at], self._late_known[at])))
            least = most
        return classes

    def sums(
        self, codes: np.ndarray, known: np.ndarray, upper: np.ndarray, lowers: list[np.ndarray]
    ) -> Iterator[list[np.ndarray]]:
        """For each lower edge, C columns int64 [N]: sums over lower <= block < upper with known_at <= known.

        Biased block indexes with lower <= upper <= known.
        """
        order = np.argsort(codes << _SHIFT | upper)  # neighbours in the tables are neighbours in memory
        codes, known, upper = codes[order], known[order], upper[order]
        at_upper = self._until(codes, known, upper)
        for lower in lowers:
            totals = []
            for high, low in zip(at_upper, self._until(codes, known, lower[order]), strict=True):
                total = np.empty_like(high)
                total[order] = high - low
                totals.append(total)
            yield totals

    def _until(self, codes: np.ndarray, known: np.ndarray, edge: np.ndarray) -> list[np.ndarray]:
        """F(edge, known) of each column, up to a constant of the key: prefix sums run on from key to key."""
        place = self._on_time.before(codes, edge)
        totals = [prefix.take(place) for prefix in self._prefix]
        if len(self._late_block):
            place = self._late.before(codes, edge + 1)
            for total, prefix in zip(totals, self._late_prefix, strict=True):
                total += prefix[place]
            for most, rows, places in self._in_flight:
                starts = places.before(codes, edge + 1)
                ends = places.before(codes, np.minimum(known, edge + most) + 1)
                for read_X, row_X in pairs(starts, ends):
                    row_X = rows[places.order[row_X]]
                    crossing = self._late_block[row_X] < edge[read_X]
                    read_X, row_X = read_X[crossing], row_X[crossing]
                    for total, value in zip(totals, self._late_sums, strict=True):
                        add_pairs(total, read_X, value[row_X])
        return totals

    def extreme(self, name: str, codes: np.ndarray, known: np.ndarray, upper: np.ndarray, lower: np.ndarray) -> Extreme:
        """The least or largest value over lower <= block < upper with known_at <= known."""
        answer = self._ranges[name].between(self._on_time.before(codes, lower), self._on_time.before(codes, upper))
        value, valid = self._late_extremes[name]
        if len(value):
            starts, ends = self._late.before(codes, lower + 1), self._late.before(codes, known + 1)
            for read_X, row_X in pairs(starts, ends):
                block = self._late_block[row_X]
                inside = (block >= lower[read_X]) & (block < upper[read_X]) & valid[row_X]
                answer.take(read_X[inside], value[row_X[inside]])
        return answer
