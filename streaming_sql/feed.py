"""Records in, store moved: admits arrivals, fills the head, closes ticks by the log, turns what a tick knows into blocks, and
takes out what was retracted.

Deterministic: the same records in any batching lead to the same store. Knows nothing of where records come from.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from streaming_sql.arrivals import Admission, Arrivals
from streaming_sql.attribute_tables import AttributeTables
from streaming_sql.block_layer import instants
from streaming_sql.head import HeadEvent
from streaming_sql.history import History
from streaming_sql.key_index import Key
from streaming_sql.micro_batch import MicroBatch
from streaming_sql.online_store import AddedBlocks, NextTick, OnlineStore
from streaming_sql.records import position_after
from streaming_sql.retractions import Place, Retraction, Retractions, split
from warehouse.errors import HeadraceError
from warehouse.features.attributes import names_of
from warehouse.features.declarations import FeatureGroup
from warehouse.time_algebra import FIVE_MINUTES_US, closed_tick, newest_tick

_LOG = logging.getLogger("headrace.stream")

REMEMBERED = ("event_id", "event_type", "event_ts", "landed_at", "log_partition", "log_offset", "retracts")


@dataclass
class Taken:
    """What one batch of records did."""

    num_events: int = 0
    num_duplicates: int = 0
    num_dead: int = 0
    num_late: int = 0
    """Events that arrived after their block's own tick: rows of a later tick."""
    num_retractions: int = 0
    closed_tick_us: int | None = None


class Ticks(Protocol):
    """Ticks whose blocks are made elsewhere, of the same log."""

    def take(self, closed_us: int) -> NextTick | None:
        """The store's next tick, closed_us at most, given once; None for not yet."""


class Feed:
    """The state between records and blocks: duplicate and retraction memory, events of open ticks, how far each partition was
    read."""

    def __init__(
        self,
        store: OnlineStore,
        groups: Mapping[str, FeatureGroup],
        position: tuple[int, ...],
        history: History,
        tables: AttributeTables | None = None,
        elsewhere: Ticks | None = None,
        max_head_events: int | None = None,
    ):
        """tables: those that add to light events; without, every attribute is NULL. elsewhere: where ticks come
        from, if not from the events that are taken; a tick then waits for it, too. max_head_events: how many events the heads
        of all groups keep together, however long no tick comes; all by default."""
        self._elsewhere, self._max_head_events = elsewhere, max_head_events
        self.store, self.arrivals, self.retractions = store, Arrivals(), Retractions()
        self._batch, self._history = MicroBatch(groups), history
        self._tables, self._tables_tick_us = tables, -1
        # events that share what a table fills are found by the block alone: lake and log hold them as they were sent
        self._keys = [tuple(key for key in g.entity_keys if key not in names_of(g.attributes)) for g in groups.values()]
        self._keep_us = max(plan.keep_us for plan in store.plans.values())
        self._has_fresh = any(plan.fresh for plan in store.plans.values())
        self.position = position
        self.read_through_us = [0] * len(position)
        self._pending: list[pa.Table] = []
        self._superseded: set[Place] = set()

    def take(self, records: pa.Table, is_history: bool = False) -> Taken:
        """Takes records (EVENTS_SCHEMA, each partition in order of offset) and moves the store.

        is_history: events that the store's blocks already hold may be among them; they only refresh the memories.
        """
        self._read_past(records)
        admission = self.arrivals.admit(records)
        events, retractions = self._remember_retractions(admission)
        self._read_tables(records)
        staged = self._batch.stage(events)
        due_from_us = self.store.tick_us
        known_at = instants(staged["known_at"])
        num_held = len(self.retractions.take_due(due_from_us)) + int((known_at <= due_from_us).sum())
        if num_held:
            if not is_history:
                raise HeadraceError(
                    f"an event that tick {due_from_us} should know arrived after it was closed: the log's landed_at fell, or "
                    "the blocks in the lake were built past the closed tick"
                )
            staged = staged.filter(pa.array(known_at > due_from_us))
        num_late = int((instants(staged["known_at"]) - instants(staged["event_ts"]) > FIVE_MINUTES_US).sum())
        taken = Taken(staged.num_rows, admission.num_duplicates, admission.num_dead, num_late, len(retractions))
        if self._elsewhere is None:
            if staged.num_rows:
                self._pending.append(staged)
            self._superseded.update(loser for loser, _ in admission.superseded)
        if (closed := self._next_tick()) is not None:
            heads = self._heads(staged.filter(pa.array(instants(staged["known_at"]) > closed.tick_us)))
            taken.closed_tick_us = self._close(closed, heads, admission.superseded, retractions)
        elif records.num_rows:
            changed = bool(retractions or admission.superseded)
            withdrawn = self._withdrawn(due_from_us) if changed else None
            self.store.advance(self.position, self._heads(staged), admission.superseded, retractions, withdrawn)
            self._bound_heads()
        return taken

    def _bound_heads(self) -> None:
        if self._max_head_events is not None and (num_dropped := self.store.drop_head_events(self._max_head_events)):
            _LOG.warning("%s head events dropped, the oldest: no tick has come to hold them", f"{num_dropped:,}")

    def move(self) -> Taken:
        """Moves the store to a tick whose blocks have come from elsewhere since the last records."""
        closed = self._next_tick()
        return Taken() if closed is None else Taken(closed_tick_us=self._close(closed, {}, (), ()))

    def _close(
        self,
        closed: NextTick,
        heads: dict[str, list[tuple[Key, HeadEvent]]],
        superseded: Sequence[tuple[Place, Place]],
        retractions: Sequence[Retraction],
    ) -> int:
        self.store.advance(self.position, heads, superseded, retractions, self._withdrawn(closed.tick_us), closed)
        self.arrivals.forget_before(min(self.read_through_us))
        self.retractions.forget_before(min(self.read_through_us))
        return closed.tick_us

    def _next_tick(self) -> NextTick | None:
        """A tick that the log has closed and the store does not hold."""
        tick_us = closed_tick(self.read_through_us)
        if not all(self.read_through_us) or tick_us is None or tick_us <= self.store.tick_us:
            return None
        if self._elsewhere is None:
            return AddedBlocks(tick_us, self._blocks(tick_us))
        taken = self._elsewhere.take(tick_us)
        if taken is None:  # however long none comes, ids are not remembered for longer
            self.arrivals.forget_before(min(self.read_through_us))
            return None
        self.retractions.take_due(taken.tick_us)
        return taken

    def remember(self, records: pa.Table) -> None:
        """Reads past records that the store's blocks are known to hold: only the memories learn of them.

        records: the columns of EVENTS_SCHEMA that say what arrived, when and where (`REMEMBERED`).
        """
        self._read_past(records)
        self._remember_retractions(self.arrivals.admit(records))
        self.retractions.take_due(self.store.tick_us)
        self.store.advance(self.position, {})

    def _read_tables(self, records: pa.Table) -> None:
        """Before the first records of a tick, what tables add to their events."""
        if self._tables is None or not records.num_rows:
            return
        tick_us = newest_tick(int(instants(records["landed_at"]).max()))
        if tick_us > self._tables_tick_us:
            for relation, rows in self._tables.changed():
                self._batch.put_attributes(relation, rows)
            self._tables_tick_us = tick_us

    def _remember_retractions(self, admission: Admission) -> tuple[pa.Table, list[Retraction]]:
        events, retractions = split(admission.events)
        self.retractions.add(retractions)
        for loser, winner in admission.superseded:
            self.retractions.supersede(loser, winner)
        return events, retractions

    def _heads(self, staged: pa.Table) -> dict[str, list[tuple[Key, HeadEvent]]]:
        heads = self._batch.heads(staged)
        if len(self.retractions):
            for _, event in (item for items in heads.values() for item in items):
                event.retractions = tuple(self.retractions.of(event.event_id, event.landed_us))
        return heads

    def _blocks(self, tick_us: int) -> dict[str, pa.Table]:
        """The block rows that a new tick adds to those of the store's: of the events that it knows first, and of blocks that
        its retractions rebuild."""
        after_us = self.store.tick_us
        due = self._due(tick_us)
        targets = {retraction.retracts for retraction in self.retractions.take_due(tick_us)}
        if len(self.retractions) and due.num_rows:
            arrived = zip(due["event_id"].to_pylist(), instants(due["landed_at"]).tolist(), strict=True)
            targets |= {event_id for event_id, landed_us in arrived if self.retractions.of(event_id, landed_us)}
        if not targets:
            return self._batch.blocks(due)
        staged, retracted = self._staged_around(targets, tick_us)
        held = staged.filter(pa.array(instants(staged["known_at"]) <= after_us))
        return self._batch.standing_blocks(pa.concat_tables([due, held]), retracted, after_us, tick_us)

    def _withdrawn(self, tick_us: int) -> dict[str, pa.Table]:
        """The blocks of a tick that hold targets of retractions which are read but wait for a later tick: rebuilt without
        them, for event-fresh measures."""
        targets = {retraction.retracts for retraction in self.retractions.waiting() if retraction.tick_us > tick_us}
        if not targets or not self._has_fresh:
            return {}
        return self._batch.blocks_as_if_known(*self._staged_around(targets, tick_us), tick_us)

    def _staged_around(self, event_ids: set[str], tick_us: int) -> tuple[pa.Table, pa.Table]:
        arrivals = self._history.around(sorted(event_ids), self._keys, self.position, tick_us - self._keep_us)
        return self._batch.stage_with_retractions(arrivals)

    def _read_past(self, records: pa.Table) -> None:
        self.position = position_after(self.position, records)
        ends = records.group_by("log_partition").aggregate([("landed_at", "max")])
        landed = ends["landed_at_max"].cast(pa.int64()).to_pylist()
        for partition, landed_us in zip(ends["log_partition"].to_pylist(), landed, strict=True):
            self.read_through_us[partition] = max(self.read_through_us[partition], landed_us)

    def _due(self, tick_us: int) -> pa.Table:
        """Takes the pending events that the tick knows, less superseded ones."""
        if not self._pending:
            return self._batch.nothing
        pending = pa.concat_tables(self._pending)
        if self._superseded:
            places = zip(pending["log_partition"].to_pylist(), pending["log_offset"].to_pylist(), strict=True)
            pending = pending.filter(pa.array([place not in self._superseded for place in places], pa.bool_()))
            self._superseded.clear()
        due = pa.array(instants(pending["known_at"]) <= tick_us)
        rest = pending.filter(pc.invert(due))
        self._pending = [rest] if rest.num_rows else []
        return pending.filter(due)
