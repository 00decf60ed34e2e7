"""Features assembled once per tick for every key that a request may ask for, so that a request only gathers rows.

Between ticks a block-fresh value never changes (design §4), so a group whose windows all hang from the tick has one matrix per
tick. Groups with event-fresh measures, request-anchored windows or calendar keys have none: theirs change with t.

Shape letters: N keys of a group, C keys asked for, F features.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from streaming_sql.feature_rows import FeatureRows
from streaming_sql.group_state import FeatureMatrix
from streaming_sql.key_index import Key
from streaming_sql.online_store import StoreView
from streaming_sql.plan import GroupPlan

_LOG = logging.getLogger("headrace.stream")
_PIECE = 4096
"""Keys assembled at once: a request that comes meanwhile waits no longer than one piece takes."""
_TICKS_KEPT = 2
_LOOKED_AT_EVERY_S = 0.2
_STAMPS = count(1)
Prepare = Callable[[StoreView, "Assembled"], Callable[[], None]]
"""Makes ready what else hangs from a tick whose features are assembled; what it returns is called as the tick is taken into
use."""


def can_be_assembled(plan: GroupPlan) -> bool:
    """Whether the group's values are functions of (key, tick) alone."""
    return not plan.group.calendar and all(family.name == "tick" for family in plan.families)


@dataclass(frozen=True)
class _OfTick:
    tick_us: int
    matrices: Mapping[str, FeatureMatrix]
    stamp: int


class Assembled:
    """The matrices of the newest ticks. One thread assembles, any number gather."""

    def __init__(self, plans: Mapping[str, GroupPlan], keys: Mapping[tuple[str, ...], Sequence[Key]]):
        """keys: of each tuple of key columns the keys to hold, in the order of their rows; groups keyed otherwise are left
        out."""
        self._keys = {
            name: keys[plan.group.entity_keys]
            for name, plan in plans.items()
            if keys.get(plan.group.entity_keys) and can_be_assembled(plan)
        }
        self._ticks: tuple[_OfTick, ...] = ()
        self._prepare: Prepare | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that are held."""
        return tuple(self._keys)

    @property
    def num_bytes(self) -> int:
        return sum(matrix.values.nbytes for of_tick in self._ticks for matrix in of_tick.matrices.values())

    def assemble(self, view: StoreView) -> None:
        """Assembles every group at the view's tick, if that is not done."""
        if self.holds(view):
            return
        matrices = {name: _in_pieces(view, name, keys) for name, keys in self._keys.items()}
        of_tick = _OfTick(view.tick_us, matrices, next(_STAMPS))
        if self._prepare is not None:
            try:
                self._prepare(view, self._with(of_tick))()
            except Exception:  # requests make it for themselves
                _LOG.exception("a tick is used unprepared")
        self._ticks = (of_tick, *self._ticks)[:_TICKS_KEPT]

    def _with(self, of_tick: _OfTick) -> "Assembled":
        """One that holds this tick alone."""
        alone = copy(self)
        alone._ticks = (of_tick,)
        return alone

    def holds(self, view: StoreView) -> bool:
        """Whether the view's tick is assembled."""
        return self._of(view) is not None

    def matrix(self, view: StoreView, name: str) -> FeatureMatrix | None:
        """A group's features of all keys that are held, at the view's tick; None where the group or the tick is not held."""
        of_tick = self._of(view)
        return None if of_tick is None else of_tick.matrices.get(name)

    def _of(self, view: StoreView) -> _OfTick | None:
        return next((one for one in self._ticks if one.tick_us == view.tick_us), None)

    def gather(
        self, view: StoreView, name: str, row_C: np.ndarray, key_of: Callable[[int], Key], t_us: int
    ) -> FeatureRows | None:
        """What `view.assemble` gives at t_us for the keys at these rows; None where the group or the tick is not held.

        row_C: int64, contiguous, -1 for a key that is not held; that is assembled now, key_of(its place among the C).
        """
        of_tick = self._of(view)
        if of_tick is None or name not in of_tick.matrices:
            return None
        held = of_tick.matrices[name]
        if not len(row_C) or row_C.min() >= 0:
            return FeatureRows(held, row_C, stamp=of_tick.stamp)
        missing = np.flatnonzero(row_C < 0)
        place_C = row_C.copy()
        place_C[missing] = -1 - np.arange(len(missing))
        own = view.assemble(name, [key_of(place) for place in missing.tolist()], t_us)
        return FeatureRows(held, place_C, own, of_tick.stamp)

    def start(self, view: Callable[[], StoreView], prepare: Prepare | None = None) -> None:
        """Assembles each new tick on a thread of its own, until `stop`."""
        self._prepare = prepare
        self._thread = threading.Thread(target=self._follow, args=(view,), name="headrace-assemble", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self, view: Callable[[], StoreView]) -> None:
        while not self._stopping.wait(_LOOKED_AT_EVERY_S):
            try:
                self.assemble(view())
            except Exception:  # requests assemble for themselves meanwhile
                _LOG.exception("a tick was not assembled")
                self._stopping.wait(10)


def _in_pieces(view: StoreView, name: str, keys: Sequence[Key]) -> FeatureMatrix:
    values: list[np.ndarray] = []
    sequences: dict[str, list[Any]] = {}
    maps: dict[str, list[Any]] = {}
    names: tuple[str, ...] = ()
    for start in range(0, max(len(keys), 1), _PIECE):
        matrix = view.assemble(name, keys[start : start + _PIECE], view.tick_us)
        names = matrix.names
        values.append(matrix.values)
        for whole, piece in ((sequences, matrix.sequences), (maps, matrix.maps)):
            for column, rows in piece.items():
                whole.setdefault(column, []).extend(rows)
    return FeatureMatrix(names, np.concatenate(values), sequences, maps)
