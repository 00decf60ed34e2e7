"""Records in, store moved: admits arrivals, fills the head, closes ticks by the log, turns what a tick knows into blocks.

Deterministic: the same records in any batching lead to the same store. Knows nothing of where records come from.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from streaming_sql.arrivals import Arrivals
from streaming_sql.block_layer import instants
from streaming_sql.head import Place
from streaming_sql.micro_batch import MicroBatch
from streaming_sql.online_store import OnlineStore
from warehouse.errors import HeadraceError
from warehouse.features.declarations import FeatureGroup
from warehouse.time_algebra import FIVE_MINUTES_US, closed_tick

REMEMBERED = ("event_id", "event_type", "event_ts", "landed_at", "log_partition", "log_offset")


@dataclass
class Taken:
    """What one batch of records did."""

    num_events: int = 0
    num_duplicates: int = 0
    num_dead: int = 0
    num_late: int = 0
    """Events that arrived after their block's own tick: rows of a later tick."""
    closed_tick_us: int | None = None


class Feed:
    """The state between records and blocks: duplicate memory, events of open ticks, how far each partition was read."""

    def __init__(self, store: OnlineStore, groups: Mapping[str, FeatureGroup], position: tuple[int, ...]):
        self.store, self.arrivals, self._batch = store, Arrivals(), MicroBatch(groups)
        self.position = position
        self.read_through_us = [0] * len(position)
        self._pending: list[pa.Table] = []
        self._superseded: set[Place] = set()

    def take(self, records: pa.Table, is_history: bool = False) -> Taken:
        """Takes records (EVENTS_SCHEMA, each partition in order of offset) and moves the store.

        is_history: events that the store's blocks already hold may be among them; they only refresh the duplicate memory.
        """
        self._read_past(records)
        admission = self.arrivals.admit(records)
        staged = self._batch.stage(admission.events)
        due_from_us = self.store.tick_us
        known_at = instants(staged["known_at"])
        if (known_at <= due_from_us).any():
            if not is_history:
                raise HeadraceError(
                    f"an event that tick {due_from_us} should know arrived after it was closed: the log's landed_at fell, or "
                    "the blocks in the lake were built past the closed tick"
                )
            staged = staged.filter(pa.array(known_at > due_from_us))
        num_late = int((instants(staged["known_at"]) - instants(staged["event_ts"]) > FIVE_MINUTES_US).sum())
        taken = Taken(staged.num_rows, admission.num_duplicates, admission.num_dead, num_late)
        if staged.num_rows:
            self._pending.append(staged)
        self._superseded.update(loser for loser, _ in admission.superseded)
        tick_us = closed_tick(self.read_through_us)
        if all(self.read_through_us) and tick_us is not None and tick_us > self.store.tick_us:
            fresh = staged.filter(pa.array(instants(staged["known_at"]) > tick_us))
            self.store.advance(
                self.position, self._batch.heads(fresh), admission.superseded, tick_us, self._batch.blocks(self._due(tick_us))
            )
            self.arrivals.forget_before(min(self.read_through_us))
            taken.closed_tick_us = tick_us
        elif records.num_rows:
            self.store.advance(self.position, self._batch.heads(staged), admission.superseded)
        return taken

    def remember(self, records: pa.Table) -> None:
        """Reads past records that the store's blocks are known to hold: only the duplicate memory learns of them.

        records: the columns of EVENTS_SCHEMA that say what arrived, when and where (`REMEMBERED`).
        """
        self._read_past(records)
        self.arrivals.admit(records)
        self.store.advance(self.position, {})

    def _read_past(self, records: pa.Table) -> None:
        position = list(self.position)
        ends = records.group_by("log_partition").aggregate([("log_offset", "max"), ("landed_at", "max")])
        for end in ends.set_column(2, "landed_us", ends["landed_at_max"].cast(pa.int64())).to_pylist():
            partition = end["log_partition"]
            position[partition] = max(position[partition], end["log_offset_max"] + 1)
            self.read_through_us[partition] = max(self.read_through_us[partition], end["landed_us"])
        self.position = tuple(position)

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
