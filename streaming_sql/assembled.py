"""Features assembled once per tick for every key that a request may ask for, so that a request only gathers rows.

Between ticks a block-fresh value never changes (design §4), so a group whose windows all hang from the tick has one matrix per
tick: that of the tick before, with new rows for keys of which a block came or went. Groups with event-fresh measures,
request-anchored windows or calendar keys have none: theirs change with t.

Shape letters: N keys of a group, C keys asked for, F features, P places among the N.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import numpy as np

from streaming_sql.changed_keys import changed_keys
from streaming_sql.feature_rows import FeatureRows
from streaming_sql.group_state import FeatureMatrix
from streaming_sql.key_index import Key
from streaming_sql.online_store import StoreView
from streaming_sql.plan import GroupPlan

_LOG = logging.getLogger("headrace.stream")
_PIECE = 4096
"""Keys assembled at once: a request that comes meanwhile waits no longer than one piece takes."""
_TICKS_KEPT = 2
_MOST_CHANGED = 2
"""Where more than one key in so many has changed, all are assembled."""
_LOOKED_AT_EVERY_S = 0.2
_STAMPS = count(1)
_Row = TypeVar("_Row")
Prepare = Callable[[StoreView, "Assembled"], Callable[[], None]]
"""Makes ready what else hangs from a tick whose features are assembled; what it returns is called as the tick is taken into
use."""


def can_be_assembled(plan: GroupPlan) -> bool:
    """Whether the group's values are functions of (key, tick) alone."""
    return not plan.group.calendar and all(family.name == "tick" for family in plan.families)


@dataclass(frozen=True)
class _Held:
    """A group at a tick. stamp_N: int64, one for each tick's changes, ascending with time: when the row changed last."""

    matrix: FeatureMatrix
    stamp_N: np.ndarray

    def with_rows(self, place_P: np.ndarray, changed: FeatureMatrix, stamp: int) -> "_Held":
        """Others at some places; `self` stays as it is."""
        if not len(place_P):
            return self
        values_NF, stamp_N = self.matrix.values.copy(), self.stamp_N.copy()
        values_NF[place_P], stamp_N[place_P] = changed.values, stamp
        sequences = _with_rows(self.matrix.sequences, place_P, changed.sequences)
        maps = _with_rows(self.matrix.maps, place_P, changed.maps)
        return _Held(FeatureMatrix(self.matrix.names, values_NF, sequences, maps), stamp_N)


@dataclass(frozen=True)
class _OfTick:
    tick_us: int
    held: Mapping[str, _Held]


class Assembled:
    """The matrices of the newest ticks. One thread assembles, any number gather."""

    def __init__(self, plans: Mapping[str, GroupPlan], keys: Mapping[tuple[str, ...], Sequence[Key]]):
        """keys: of each tuple of key columns the keys to hold, in the order of their rows, none twice; groups keyed otherwise
        are left out. Raises ValueError where a key comes twice."""
        self._keys = {
            name: keys[plan.group.entity_keys]
            for name, plan in plans.items()
            if keys.get(plan.group.entity_keys) and can_be_assembled(plan)
        }
        self._place_of = {columns: {key: place for place, key in enumerate(held)} for columns, held in keys.items()}
        for columns, place_of in self._place_of.items():
            if len(place_of) < len(keys[columns]):
                raise ValueError(f"{len(keys[columns]) - len(place_of)} keys of {', '.join(columns)} come twice")
        self._ticks: tuple[_OfTick, ...] = ()
        self._newest: StoreView | None = None
        """What the first of the ticks was assembled from."""
        self._prepare: Prepare | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that are held."""
        return tuple(self._keys)

    @property
    def num_bytes(self) -> int:
        return sum(held.matrix.values.nbytes for of_tick in self._ticks for held in of_tick.held.values())

    def assemble(self, view: StoreView) -> None:
        """Assembles every group at the view's tick, if that is not done."""
        if self.holds(view):
            return
        stamp = next(_STAMPS)
        of_tick = _OfTick(view.tick_us, {name: self._at(view, name, stamp) for name in self._keys})
        if self._prepare is not None:
            try:
                self._prepare(view, self._with(of_tick))()
            except Exception:  # requests make it for themselves
                _LOG.exception("a tick is used unprepared")
        self._ticks, self._newest = (of_tick, *self._ticks)[:_TICKS_KEPT], view

    def _at(self, view: StoreView, name: str, stamp: int) -> _Held:
        """What the newest tick holds, with what has changed since."""
        keys = self._keys[name]
        changed = None if self._newest is None else changed_keys(self._newest, view, name)
        if changed is None or len(changed) * _MOST_CHANGED > len(keys):
            return _Held(_in_pieces(view, name, keys), np.full(len(keys), stamp))
        place_of = self._place_of[view.groups[name].plan.group.entity_keys]
        places = sorted(place_of[key] for key in changed if key in place_of)
        rows = _in_pieces(view, name, [keys[place] for place in places])
        return self._ticks[0].held[name].with_rows(np.array(places, dtype=np.int64), rows, stamp)

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
        held = None if of_tick is None else of_tick.held.get(name)
        return None if held is None else held.matrix

    def _of(self, view: StoreView) -> _OfTick | None:
        return next((one for one in self._ticks if one.tick_us == view.tick_us), None)

    def gather(
        self, view: StoreView, name: str, row_C: np.ndarray, key_of: Callable[[int], Key], t_us: int
    ) -> FeatureRows | None:
        """What `view.assemble` gives at t_us for the keys at these rows; None where the group or the tick is not held.

        row_C: int64, contiguous, -1 for a key that is not held; that is assembled now, key_of(its place among the C).
        """
        of_tick = self._of(view)
        held = None if of_tick is None else of_tick.held.get(name)
        if held is None:
            return None
        if not len(row_C) or row_C.min() >= 0:
            return FeatureRows(held.matrix, row_C, stamp_R=held.stamp_N)
        missing = np.flatnonzero(row_C < 0)
        place_C = row_C.copy()
        place_C[missing] = -1 - np.arange(len(missing))
        own = view.assemble(name, [key_of(place) for place in missing.tolist()], t_us)
        return FeatureRows(held.matrix, place_C, own, held.stamp_N)

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


def _with_rows(
    whole: Mapping[str, list[_Row]], place_P: np.ndarray, changed: Mapping[str, list[_Row]]
) -> dict[str, list[_Row]]:
    made = {name: list(rows) for name, rows in whole.items()}
    for name, rows in changed.items():
        for place, row in zip(place_P.tolist(), rows, strict=True):
            made[name][place] = row
    return made


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
