"""Retractions that are remembered, by the event_id they retract: what the head asks when it decides whether an event counts.

A retraction is remembered for H after it landed; a target that lands later than that counts. Like an event it may be
superseded, by an earlier arrival of its own id that a lagging partition delivers later. Knows nothing of blocks.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from warehouse.events import RETRACTION
from warehouse.time_algebra import DUPLICATE_MEMORY_US, HOUR_US, arrival_tick

Place = tuple[int, int]
"""(log_partition, log_offset)."""


@dataclass(slots=True)
class Retraction:
    """One accepted retraction; what a reader sees of it is decided by the reader's position alone."""

    retracts: str
    landed_us: int
    place: Place
    superseded_by: Place | None = None

    @property
    def tick_us(self) -> int:
        """The first tick that knows it."""
        return arrival_tick(self.landed_us)

    def holds_for(self, landed_us: int) -> bool:
        """Whether an arrival of its target that landed then is retracted."""
        return landed_us <= self.landed_us + DUPLICATE_MEMORY_US

    def is_known(self, position: Sequence[int]) -> bool:
        return is_below(self.place, position) and not (self.superseded_by and is_below(self.superseded_by, position))


def is_below(place: Place, position: Sequence[int]) -> bool:
    """Whether a reader at the position has read the record at the place."""
    return place[1] < position[place[0]]


def split(events: pa.Table) -> tuple[pa.Table, list[Retraction]]:
    """First arrivals (at least the columns that say what arrived, when and where) as events of features, and retractions."""
    is_retraction = pc.equal(events["event_type"], RETRACTION)
    if not pc.any(is_retraction).as_py():
        return events, []
    rows = events.filter(is_retraction)
    columns = [rows[name].to_pylist() for name in ("retracts", "log_partition", "log_offset")]
    landed = rows["landed_at"].cast(pa.int64()).to_pylist()
    found = [
        Retraction(retracts, landed_us, (partition, offset))
        for landed_us, retracts, partition, offset in zip(landed, *columns, strict=True)
        if retracts is not None
    ]
    return events.filter(pc.invert(is_retraction)), found


@dataclass
class Retractions:
    """The memory."""

    _of_target: dict[str, list[Retraction]] = field(default_factory=dict)
    _at: dict[Place, Retraction] = field(default_factory=dict)
    _by_age: deque[Retraction] = field(default_factory=deque)
    _waiting: list[Retraction] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._at)

    def add(self, retractions: Iterable[Retraction]) -> None:
        for retraction in retractions:
            self._of_target.setdefault(retraction.retracts, []).append(retraction)
            self._at[retraction.place] = retraction
            self._by_age.append(retraction)
            self._waiting.append(retraction)

    def supersede(self, loser: Place, winner: Place) -> None:
        """The retraction at `loser`, if there is one, is unknown to readers that know `winner`."""
        if loser in self._at:
            self._at[loser].superseded_by = winner

    def of(self, event_id: str, landed_us: int) -> list[Retraction]:
        """Those that hold for an arrival of event_id that landed then."""
        return [retraction for retraction in self._of_target.get(event_id, ()) if retraction.holds_for(landed_us)]

    def take_due(self, tick_us: int) -> list[Retraction]:
        """Those that the tick knows and no earlier one did; they wait no longer."""
        due = [retraction for retraction in self._waiting if retraction.tick_us <= tick_us]
        self._waiting = [retraction for retraction in self._waiting if retraction.tick_us > tick_us]
        return [retraction for retraction in due if retraction.superseded_by is None]

    def waiting(self) -> list[Retraction]:
        """Those that stand but wait for their tick."""
        return [retraction for retraction in self._waiting if retraction.superseded_by is None]

    def forget_before(self, read_through_us: int) -> None:
        """Drops what holds for nothing that may still come or waits for its tick. Every partition was read past
        read_through_us."""
        oldest_us = read_through_us - DUPLICATE_MEMORY_US - HOUR_US
        while self._by_age and self._by_age[0].landed_us < oldest_us:
            gone = self._by_age.popleft()
            del self._at[gone.place]
            others = [one for one in self._of_target[gone.retracts] if one is not gone]
            if others:
                self._of_target[gone.retracts] = others
            else:
                del self._of_target[gone.retracts]
