"""Batches from a position on, made ahead of need: groups are read by threads, the next window while this one is in use.

A batch is B positions of the epoch; a rank takes the ones whose lane is its own (or, with fewer lanes than ranks, every
W-th), so over the ranks each row is in one batch, once. The last batch of an epoch is short; none reaches into the next.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from models_ml.trainer.order import EpochOrder
from models_ml.trainer.rows import Rows, Source


@dataclass(frozen=True)
class Place:
    """This process among those that train. rank in [0, size)."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Batch:
    """first, last: the batch's positions, over all ranks. rows: this rank's part, perhaps empty. ready: what the model makes
    of it."""

    first: int
    last: int
    rows: Rows
    ready: Any


class Loader:
    """Reads a source in the order of (seed, epoch, source). cache_bytes: groups kept for later epochs; windows come on top.

    `iterate(consumed, epochs)` yields every batch from row `consumed` on; `consumed` counts all rows of all epochs.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        batch_size: int,
        collate: Callable[[Rows], Any],
        place: Place = Place(),
        workers: int = 2,
        prefetch: int = 4,
        cache_bytes: int = 1 << 30,
    ):
        self._source, self._seed, self._batch_size, self._collate, self._place = source, seed, batch_size, collate, place
        self._prefetch, self._cache_bytes, self._workers = prefetch, cache_bytes, workers
        self.num_rows = int(sum(source.group_sizes))
        self._groups: OrderedDict[int, Future[Rows]] = OrderedDict()

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.num_rows // self._batch_size)

    def some_rows(self, most: int) -> Rows:
        """The first rows of the source, in its own order."""
        rows = self._source.read(0)
        return rows.take(np.arange(min(most, len(rows))))

    def iterate(self, consumed: int, epochs: int) -> Iterator[Batch]:
        """From row `consumed` to the end of the last epoch. Errors of the reading threads are raised here."""
        made: queue.Queue = queue.Queue(self._prefetch)
        stop = threading.Event()

        def make() -> None:
            try:
                with ThreadPoolExecutor(self._workers, thread_name_prefix="rows") as readers:
                    for batch in self._batches(consumed, epochs, readers):
                        if not _put(made, batch, stop):
                            return
                _put(made, None, stop)
            except BaseException as error:
                _put(made, error, stop)

        thread = threading.Thread(target=make, name="batches", daemon=True)
        thread.start()
        try:
            while (batch := made.get()) is not None:
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            stop.set()
            thread.join()
            self._groups.clear()

    def _batches(self, consumed: int, epochs: int, readers: ThreadPoolExecutor) -> Iterator[Batch]:
        first_epoch, start = divmod(consumed, self.num_rows)
        for epoch in range(first_epoch, epochs):
            order = EpochOrder(self._source.group_sizes, self._seed, self._source.fingerprint, epoch)
            windows: dict[int, tuple[int, Rows, np.ndarray]] = {}
            base = epoch * self.num_rows
            for first in range(start, self.num_rows, self._batch_size):
                last = min(first + self._batch_size, self.num_rows)
                rows = self._rows(order, np.arange(first, last), windows, readers)
                yield Batch(base + first, base + last, rows, self._collate(rows))
            start = 0

    def _rows(self, order: EpochOrder, positions: np.ndarray, windows: dict, readers: ThreadPoolExecutor) -> Rows:
        lane, row = order.place(positions)
        rank, size = self._place.rank, self._place.size
        mine = (lane if order.num_lanes >= size else positions) % size == rank
        lane, row = lane[mine], row[mine]
        parts, places = [], []
        for one in np.unique(lane).tolist():
            of_lane = np.flatnonzero(lane == one)
            window, inside = order.window_of(one, row[of_lane])
            for number in np.unique(window).tolist():
                rows, shuffled = self._window(order, one, number, windows, readers)
                chosen = window == number
                parts.append(rows.take(shuffled[inside[chosen]]))
                places.append(of_lane[chosen])
        if not parts:  # a rank may have no row of a short last batch; the model still takes part in the sum of gradients
            return self._group(order.window(0, 0).groups[0], readers).result().take(np.arange(0))
        back = np.empty(len(lane), dtype=np.int64)
        back[np.concatenate(places)] = np.arange(len(lane))
        return Rows.concat(parts).take(back)

    def _window(self, order: EpochOrder, lane: int, number: int, windows: dict, readers: ThreadPoolExecutor) -> tuple:
        if lane in windows and windows[lane][0] == number:
            return windows[lane][1:]
        now = order.window(lane, number)
        futures = [self._group(group, readers) for group in now.groups]
        if number + 1 < order.num_windows(lane):
            for group in order.window(lane, number + 1).groups:
                self._group(group, readers)
        windows[lane] = (number, Rows.concat([future.result() for future in futures]), now.order)
        self._forget()
        return windows[lane][1:]

    def _group(self, group: int, readers: ThreadPoolExecutor) -> "Future[Rows]":
        if group not in self._groups:
            self._groups[group] = readers.submit(self._source.read, group)
        self._groups.move_to_end(group)
        return self._groups[group]

    def _forget(self) -> None:
        """The groups used longest ago go first; those being read stay."""
        done = [group for group, future in self._groups.items() if future.done()]
        held = {group: self._groups[group].result().num_bytes for group in done}
        excess = sum(held.values()) - self._cache_bytes
        for group in done:
            if excess <= 0:
                return
            excess -= held[group]
            del self._groups[group]


def _put(made: queue.Queue, item: object, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            made.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
