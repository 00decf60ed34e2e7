"""Request rows in memory: what a request has once, and what each of its candidates has, ragged.

R request rows, N candidates of all of them, P lanes, C candidates of a lane.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

READER_COST = 4
"""What a lane costs beside its candidates, in candidates: it copies the reader's half."""


@dataclass(frozen=True)
class Rows:
    """row_id: int64 [R], a row's number in its file set. per_row: name -> [R, ...]; per_candidate: name -> [N, ...]; the
    candidates of row r are `offsets[r]` to `offsets[r + 1]` (int64 [R + 1])."""

    row_id: np.ndarray
    per_row: Mapping[str, np.ndarray]
    per_candidate: Mapping[str, np.ndarray]
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.row_id)

    @property
    def num_candidates(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in (*self.per_row.values(), *self.per_candidate.values(), self.offsets, self.row_id))

    def take(self, places: np.ndarray) -> "Rows":
        """The rows at these places, in this order."""
        starts, counts = self.offsets[places], self.offsets[places + 1] - self.offsets[places]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        is_one_each = self.num_candidates == len(self) and (counts == 1).all()
        candidates = starts if is_one_each else np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1])
        return Rows(
            self.row_id[places],
            {name: part[places] for name, part in self.per_row.items()},
            {name: part[candidates] for name, part in self.per_candidate.items()},
            offsets,
        )

    def part(self, start: int, end: int) -> "Rows":
        """The rows from one place to another, nothing copied."""
        first, last = self.offsets[start], self.offsets[end]
        return Rows(
            self.row_id[start:end],
            {name: part[start:end] for name, part in self.per_row.items()},
            {name: part[first:last] for name, part in self.per_candidate.items()},
            self.offsets[start : end + 1] - first,
        )

    def or_empty_row(self) -> "Rows":
        """Itself, or, if it has no row, one row of zeros without candidates: a rank without rows still takes its step."""
        if len(self):
            return self
        zeros = {name: np.zeros((1, *part.shape[1:]), part.dtype) for name, part in self.per_row.items()}
        return Rows(np.array([-1]), zeros, self.per_candidate, np.array([0, 0]))

    @staticmethod
    def concat(parts: Sequence["Rows"]) -> "Rows":
        """One after the other; all with the same names."""
        if len(parts) == 1:
            return parts[0]
        counts = np.concatenate([np.diff(part.offsets) for part in parts])
        return Rows(
            np.concatenate([part.row_id for part in parts]),
            {name: np.concatenate([part.per_row[name] for part in parts]) for name in parts[0].per_row},
            {name: np.concatenate([part.per_candidate[name] for part in parts]) for name in parts[0].per_candidate},
            np.concatenate([[0], np.cumsum(counts)]),
        )


class Source(Protocol):
    """Rows in groups that are read whole. fingerprint: changes whenever a row does."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def group_sizes(self) -> Sequence[int]: ...

    def read(self, group: int) -> Rows:
        """Any thread may call it; the same group gives the same rows."""
        ...


class ArraySource:
    """Rows that are in memory already, in groups of `group_size`."""

    def __init__(self, rows: Rows, fingerprint: str, group_size: int = 8192):
        self._rows, self._group_size, self.fingerprint = rows, group_size, fingerprint
        starts = range(0, len(rows), group_size)
        self.group_sizes = [min(group_size, len(rows) - start) for start in starts]

    def read(self, group: int) -> Rows:
        start = group * self._group_size
        return self._rows.part(start, start + self.group_sizes[group])


class PartOf:
    """Some groups of a source, as a source of its own."""

    def __init__(self, whole: Source, groups: Sequence[int]):
        self._whole, self._groups = whole, list(groups)
        self.fingerprint = f"{whole.fingerprint}:{self._groups[0]}-{self._groups[-1]}"
        self.group_sizes = [whole.group_sizes[group] for group in self._groups]

    def read(self, group: int) -> Rows:
        return self._whole.read(self._groups[group])


def split_off_the_end(source: Source, share: float) -> tuple[Source, Source]:
    """(the first groups, the last ones that hold at least `share` of the rows): rows are in order of time, so the second part
    is later than the first. Raises ValueError when either would be empty."""
    sizes = np.asarray(source.group_sizes)
    from_end = np.cumsum(sizes[::-1])
    cut = len(sizes) - 1 - int(np.searchsorted(from_end, share * sizes.sum()))
    if not 0 < cut < len(sizes):
        raise ValueError(f"{len(sizes)} row group(s) cannot be split so that the last hold {share:.0%} of the rows")
    return PartOf(source, range(cut)), PartOf(source, range(cut, len(sizes)))


def lanes(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row of each lane int64 [P], candidate of each place of a lane int64 [P, C], -1 = empty).

    Requests have unequal numbers of candidates and matrices have not: long requests are cut into lanes of C candidates, C the
    power of two with the least work in all. A request without candidates has one empty lane.
    """
    counts = np.diff(offsets)
    widths = 2 ** np.arange(int(counts.max(initial=1)).bit_length() + 1)
    costs = [(-(-counts // width)).sum() * (width + READER_COST) for width in widths]
    width = int(widths[int(np.argmin(costs))])
    lanes_R = np.maximum(-(-counts // width), 1)
    row_P = np.repeat(np.arange(len(counts)), lanes_R)
    lane_of_row_P = np.arange(len(row_P)) - np.repeat(np.cumsum(lanes_R) - lanes_R, lanes_R)
    place_PC = (offsets[row_P] + lane_of_row_P * width)[:, None] + np.arange(width)
    return row_P, np.where(place_PC < offsets[row_P + 1][:, None], place_PC, -1)


def in_lanes(values: np.ndarray, place_PC: np.ndarray, empty: float) -> np.ndarray:
    """[N, ...] -> [P, C, ...] with `empty` where a lane has no candidate."""
    padded = np.concatenate([values, np.full((1, *values.shape[1:]), empty, values.dtype)])
    return padded[place_PC]
