"""Feature values at request time: all groups at one tick, plus the head of the log for fresh ones.

The store moves from tick to tick and keeps two; `view()` is an immutable snapshot, so one request reads every group at one
(T, K). One thread advances it (the runner), any number read.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import pyarrow as pa

from streaming_sql.block_layer import BlockLayer, Blocks
from streaming_sql.bulk_load import blocks_in_lake
from streaming_sql.explain import Explanation, explain_key
from streaming_sql.group_state import FeatureMatrix, GroupState
from streaming_sql.head import Head, HeadEvent
from streaming_sql.key_index import Key, KeyIndex
from streaming_sql.plan import GroupPlan
from streaming_sql.retractions import Place, Retraction
from streaming_sql.text_codes import TextCodes
from streaming_sql.window_reader import Instant
from warehouse.errors import HeadraceError
from warehouse.events import NUM_PARTITIONS
from warehouse.features.declarations import FeatureGroup
from warehouse.lake import Lake
from warehouse.time_algebra import newest_tick

_MERGE_FACTOR = 4
"""A layer is merged into the one before it once it is no smaller than a quarter of it: logarithmically many layers."""


@dataclass(frozen=True)
class StoreView:
    """All groups at one tick T (`tick_us`) and one log position K."""

    tick_us: int
    position: tuple[int, ...]
    groups: Mapping[str, GroupState]
    withdrawn: Mapping[str, pa.Table] = field(default_factory=dict)
    """By group, the rebuilt rows that `fresh_layers` were made of."""
    dropped_through_us: int = 0
    """The last tick that an event which the head had no room for waited for."""

    @property
    def lacks_events(self) -> bool:
        """Whether events are neither in the blocks of the tick nor in the head, so that event-fresh measures lack them."""
        return self.dropped_through_us > self.tick_us

    def assemble(self, group_name: str, keys: Sequence[Key], t_us: int) -> FeatureMatrix:
        """The group's features for N keys as a request at t_us reads them; unknown keys get the empty values.

        keys: tuples in the order of the group's entity keys; calendar keys are parts of t. Raises HeadraceError for an unknown
        group, ValueError if t_us is before the tick (its blocks may hold what happens after t).
        """
        return self._state(group_name, t_us).assemble(keys, Instant(self.tick_us, self.position, t_us))

    def explain(self, group_name: str, key: Key, t_us: int) -> Explanation:
        """One key's values with their tick, position, blocks and head events. Errors as in `assemble`."""
        return explain_key(self._state(group_name, t_us), key, Instant(self.tick_us, self.position, t_us))

    def _state(self, group_name: str, t_us: int) -> GroupState:
        state = self.groups.get(group_name)
        if state is None:
            raise HeadraceError(f"no feature group {group_name}; there are {', '.join(self.groups)}")
        if t_us < self.tick_us:
            raise ValueError(f"t_us {t_us} is before the view's tick {self.tick_us}: ask the store for view(at_us=t_us)")
        return state


@dataclass(frozen=True)
class Before:
    """The last view of the tick before. made_s, replaced_s: when it was made and when the next tick's first one came, as
    `time.monotonic` tells it."""

    view: StoreView
    made_s: float
    replaced_s: float


@dataclass
class Work:
    """What ticks have cost a group since the store was made: only keys with new blocks are touched, and merging is the one
    time that others are copied."""

    num_keys_touched: int = 0
    num_blocks_added: int = 0
    num_blocks_merged: int = 0


class NextTick(Protocol):
    """A tick that a store moves to."""

    @property
    def tick_us(self) -> int: ...

    def of(self, state: GroupState, work: Work) -> GroupState:
        """The group's state at the tick, its head being what the tick does not hold."""


@dataclass(frozen=True)
class AddedBlocks:
    """A tick by the rows of `features.<group>` that it adds, rebuilt ones in place of what there is."""

    tick_us: int
    rows: Mapping[str, pa.Table] = field(default_factory=dict)

    def of(self, state: GroupState, work: Work) -> GroupState:
        layers = _with_blocks(state, self.rows.get(state.plan.group.name), self.tick_us, work)
        return replace(state, layers=layers, head=state.head.after(self.tick_us), fresh_layers=None).without_unused()


class OnlineStore:
    """The current view and the one a tick older."""

    def __init__(self, groups: Mapping[str, FeatureGroup], tick_us: int = 0, position: tuple[int, ...] = (0,) * NUM_PARTITIONS):
        self.plans = {name: GroupPlan.of(group) for name, group in groups.items()}
        states = {
            name: GroupState(plan, KeyIndex(plan.group.keys), TextCodes(), (), Head()) for name, plan in self.plans.items()
        }
        self._view = StoreView(tick_us, position, states)
        self._made_s = time.monotonic()
        self._before = Before(self._view, self._made_s, self._made_s)
        self.work = {name: Work() for name in groups}
        self.blocks_through = (0,) * len(position)
        """Records of the log at or after this position are in no block of the store it started as; before it some may be,
        landed or not."""

    @classmethod
    def from_lake(cls, lake: Lake, groups: Mapping[str, FeatureGroup]) -> "OnlineStore":
        """A store at the newest tick that the lake's block tables hold in full. `Runner.catch_up` replays what came after."""
        store = cls(groups)
        tick_us, blocks = blocks_in_lake(lake, groups)
        if tick_us:
            store.advance(store.position, {}, tick=AddedBlocks(tick_us, blocks))
        return store

    @classmethod
    def of_blocks(cls, view: StoreView, position: tuple[int, ...]) -> "OnlineStore":
        """A store that starts from the blocks of a view of an earlier process, made when it had read up to `position`."""
        store = cls({name: state.plan.group for name, state in view.groups.items()}, position=(0,) * len(position))
        for state in view.groups.values():
            state.index.find_free()
            state.codes.find_free()
        store._view = replace(view, position=(0,) * len(position))
        store._before = replace(store._before, view=store._view)
        store.blocks_through = position
        return store

    def view(self, at_us: int | None = None) -> StoreView:
        """The newest view, or for a request at `at_us` the newest that it may read: T <= floor_5m(at_us − grace).

        Raises HeadraceError if both kept ticks are newer than that.
        """
        view, previous = self._view, self._before.view
        if at_us is None or view.tick_us <= newest_tick(at_us):
            return view
        if previous.tick_us <= newest_tick(at_us):
            return previous
        raise HeadraceError(f"the store keeps ticks from {previous.tick_us} us on; a request at {at_us} us needs an older one")

    def before(self) -> Before:
        """What a tick before the newest view's read last."""
        return self._before

    @property
    def tick_us(self) -> int:
        return self._view.tick_us

    @property
    def position(self) -> tuple[int, ...]:
        return self._view.position

    def advance(
        self,
        position: tuple[int, ...],
        head: Mapping[str, Sequence[tuple[Key, HeadEvent]]],
        superseded: Sequence[tuple[Place, Place]] = (),
        retractions: Sequence[Retraction] = (),
        withdrawn: Mapping[str, pa.Table] | None = None,
        tick: NextTick | None = None,
    ) -> None:
        """Moves to a log position and, with `tick`, to a newer tick; readers see all of it at once.

        head: new events of each fresh group; superseded: (loser, winner) places; retractions: those read since; withdrawn:
        rebuilt rows of `features.<group>` that event-fresh measures read in place of the tick's (None: as before). Raises
        ValueError if the tick is not newer.
        """
        view = self._view
        if tick is not None and tick.tick_us <= view.tick_us:
            raise ValueError(f"the tick must be after {view.tick_us}, got {tick.tick_us}")
        states = dict(view.groups)
        for name, events in head.items():
            for key, event in events:
                states[name].code(event)
                states[name].head.add(key, event)
        for state in states.values():
            for retraction in retractions:
                state.head.retract(retraction)
            for loser, winner in superseded:
                state.head.supersede(loser, winner)
        if tick is not None:
            states = {name: tick.of(state, self.work[name]) for name, state in states.items()}
        if withdrawn is not None:
            for name, state in states.items():
                states[name] = replace(state, fresh_layers=without_withdrawn(state, withdrawn.get(name)))
        if withdrawn is None:
            withdrawn = view.withdrawn if tick is None else {}
        moved_us = view.tick_us if tick is None else tick.tick_us
        next_view = replace(view, tick_us=moved_us, position=position, groups=states, withdrawn=withdrawn)
        now_s = time.monotonic()
        if tick is not None:
            self._before = Before(view, self._made_s, now_s)
        self._view, self._made_s = next_view, now_s

    def num_bytes(self) -> dict[str, int]:
        """Bytes of the blocks of each group (key index, texts of map entries and head not counted)."""
        return {name: sum(layer.num_bytes for layer in state.layers) for name, state in self._view.groups.items()}

    def drop_head_events(self, max_events: int) -> int:
        """Where the heads hold more than max_events, drops those that landed first, down to three quarters of it; the view then
        `lacks_events` until a tick holds them. Returns how many went. On the thread that advances."""
        if self.num_head_events() <= max_events:
            return 0
        view = self._view
        landed_us = np.array([event.landed_us for s in view.groups.values() for _, event in s.head.events()], dtype=np.int64)
        landed_us.sort()
        last_us = int(landed_us[-1 - max_events * 3 // 4])
        parts = {name: state.head.split(last_us + 1) for name, state in view.groups.items()}
        states = {name: replace(state, head=parts[name][0]).without_unused() for name, state in view.groups.items()}
        dropped_through_us = max(known_at for _, known_at in parts.values())
        self._view = replace(view, groups=states, dropped_through_us=max(view.dropped_through_us, dropped_through_us))
        return len(landed_us) - self.num_head_events()

    def num_head_events(self) -> int:
        """Events that wait in the heads for a tick to hold them."""
        return sum(len(state.head) for state in self._view.groups.values())

    def num_keys(self) -> dict[str, int]:
        return {name: len(state.index) for name, state in self._view.groups.items()}


def _with_blocks(state: GroupState, rows: pa.Table | None, tick_us: int, work: Work) -> tuple[BlockLayer, ...]:
    """The group's layers with one more, emptied of what it rebuilds, and merged where sizes have come close."""
    if rows is None or rows.num_rows == 0:
        return state.layers
    layers = _with_layer(state, rows)
    work.num_keys_touched += len(layers[-1].rows)
    work.num_blocks_added += layers[-1].num_blocks
    first = len(layers) - 1
    size = layers[-1].num_blocks
    while first > 0 and size * _MERGE_FACTOR >= layers[first - 1].num_blocks:
        first -= 1
        size += layers[first].num_blocks
    if first < len(layers) - 1:
        work.num_blocks_merged += size
        layers[first:] = [BlockLayer.merge(state.plan, layers[first:], state.plan.keep_from_us(tick_us))]
    return tuple(layers)


def without_withdrawn(state: GroupState, rows: pa.Table | None) -> tuple[BlockLayer, ...] | None:
    """What event-fresh measures read in place of the group's layers; None where that is the layers."""
    if rows is None or rows.num_rows == 0 or not state.plan.fresh:
        return None
    return tuple(_with_layer(state, rows))


def _with_layer(state: GroupState, rows: pa.Table) -> list[BlockLayer]:
    blocks = Blocks.of(state.plan, state.index.add(rows), rows, state.codes)
    is_rebuilt = rows["is_rebuilt"].to_numpy()
    layers = state.layers
    if is_rebuilt.any():
        emptied = blocks.row[is_rebuilt], blocks.block_start[is_rebuilt]
        layers = tuple(layer.without(state.plan, *emptied) for layer in layers)
    return [*layers, BlockLayer.build(state.plan, blocks)]
