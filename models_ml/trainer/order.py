"""The order in which an epoch reads its rows, as a pure function of (seed, epoch, file set).

Row groups are shuffled and dealt to lanes; a lane shuffles the rows of some neighbouring groups (a window) at a time, so
that a group is read once and only a window is in memory. Position p of the epoch takes the lanes in turn. Nothing here
knows of ranks: the rows of positions p to p + B are the same for any number of them, so one integer says where training is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WINDOW_ROWS = 1 << 18
"""Rows that are shuffled together, over all lanes: what is held in memory, more or less."""
MOST_LANES = 64
_GROUPS_OF_A_LANE = 8


class Window(NamedTuple):
    """Neighbouring groups of a lane and the order of their rows, laid end to end."""

    groups: tuple[int, ...]
    order: np.ndarray


class EpochOrder:
    """One epoch. `place` says which lane and which of its rows a position is; `window` what lies there."""

    def __init__(self, group_sizes: Sequence[int], seed: int, fingerprint: str, epoch: int, window_rows: int = WINDOW_ROWS):
        sizes = np.asarray(group_sizes, dtype=np.int64)
        self._key = _mix(np.uint64(seed), np.uint64(epoch), np.uint64(int(fingerprint_number(fingerprint))))
        self.num_rows = int(sizes.sum())
        self.num_lanes = int(np.clip(len(sizes) // _GROUPS_OF_A_LANE, 1, MOST_LANES))
        shuffled = _permutation(len(sizes), self._key)
        self._windows: list[list[tuple[int, ...]]] = []
        self._window_ends: list[np.ndarray] = []
        for lane in range(self.num_lanes):
            windows = _in_windows(shuffled[lane :: self.num_lanes], sizes, max(1, window_rows // self.num_lanes))
            self._windows.append(windows)
            self._window_ends.append(np.cumsum([sizes[list(groups)].sum() for groups in windows]))
        # lanes end at different places: between two ends the same lanes take turns
        lengths = np.array([int(ends[-1]) for ends in self._window_ends])
        self._stage_starts = np.concatenate([[0], np.unique(lengths)[:-1]])
        self._stage_lanes = [np.flatnonzero(lengths > start) for start in self._stage_starts]
        widths = np.diff(np.append(self._stage_starts, lengths.max()))
        rows = [int(width) * len(lanes) for width, lanes in zip(widths, self._stage_lanes, strict=True)]
        self._stage_first = np.concatenate([[0], np.cumsum(rows)[:-1]])

    def place(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(lane, row of the lane) of positions in [0, num_rows)."""
        stage = np.searchsorted(self._stage_first, positions, side="right") - 1
        lane, row = np.empty_like(positions), np.empty_like(positions)
        for one in np.unique(stage):
            mine, lanes = stage == one, self._stage_lanes[one]
            turn, lane_place = np.divmod(positions[mine] - self._stage_first[one], len(lanes))
            lane[mine], row[mine] = lanes[lane_place], self._stage_starts[one] + turn
        return lane, row

    def window_of(self, lane: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(window, place in its order) of rows of a lane."""
        ends = self._window_ends[lane]
        window = np.searchsorted(ends, rows, side="right")
        return window, rows - np.concatenate([[0], ends])[window]

    def num_windows(self, lane: int) -> int:
        return len(self._windows[lane])

    def window(self, lane: int, window: int) -> Window:
        groups = self._windows[lane][window]
        ends = self._window_ends[lane]
        size = int(ends[window] - (ends[window - 1] if window else 0))
        return Window(groups, _permutation(size, _mix(self._key, np.uint64(lane + 1), np.uint64(window + 1))))


def _in_windows(groups: np.ndarray, sizes: np.ndarray, most_rows: int) -> list[tuple[int, ...]]:
    windows: list[list[int]] = []
    rows = 0
    for group in groups.tolist():
        if not windows or rows + sizes[group] > most_rows:
            windows.append([])
            rows = 0
        windows[-1].append(group)
        rows += int(sizes[group])
    return [tuple(window) for window in windows]


def fingerprint_number(text: str) -> np.uint64:
    """64 bits of a text, the same on every machine."""
    number = np.uint64(0)
    for start in range(0, len(text), 8):
        part = int.from_bytes(text[start : start + 8].encode("ascii", "replace")[:8].ljust(8, b"\0"), "little")
        number = _mix(number, np.uint64(part))
    return number


def _permutation(size: int, key: np.uint64) -> np.ndarray:
    """int64 [size]. Sorting hashes, not a library's shuffle: those may change between versions, and a place would be lost."""
    return np.argsort(_splitmix(np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key), kind="stable")


def _mix(*parts: np.uint64) -> np.uint64:
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = _splitmix(key ^ part)
    return key[0]


def _splitmix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): one to one on 64 bits."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
