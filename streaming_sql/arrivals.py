"""What becomes of a record when it arrives: a heartbeat, a dead letter, a duplicate, or an event. Design §4, "Arrival".

Knows nothing of features. Each event_id is remembered for H after its last arrival; among the arrivals that are known the
first by (landed_at, log_partition, log_offset) wins, also when a lagging partition delivers it last.
"""

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from streaming_sql.retractions import Place
from warehouse.events import DEAD_LETTER, HEARTBEAT
from warehouse.time_algebra import DAY_US, DUPLICATE_MEMORY_US, FURTHEST_AHEAD_US, MINUTE_US

LATE = f"event is older on arrival than the duplicate memory of {DUPLICATE_MEMORY_US // DAY_US} days"
AHEAD = f"event is stamped more than {FURTHEST_AHEAD_US // MINUTE_US} minutes ahead of the clock"


def reasons(records: pa.Table) -> pa.ChunkedArray:
    """Why each record is a dead letter (string), null where it is not. records: EVENTS_SCHEMA."""
    age = pc.subtract(records["landed_at"].cast(pa.int64()), records["event_ts"].cast(pa.int64()))
    fine = pa.scalar(None, pa.string())
    why = pc.if_else(pc.greater(age, DUPLICATE_MEMORY_US), LATE, pc.if_else(pc.less(age, -FURTHEST_AHEAD_US), AHEAD, fine))
    is_letter = pc.equal(records["event_type"], DEAD_LETTER)
    if not pc.any(is_letter).as_py():
        return why
    told = [
        orjson.loads(properties)["reason"] if letter else None
        for properties, letter in zip(records["properties"].to_pylist(), is_letter.to_pylist(), strict=True)
    ]
    return pc.coalesce(pa.chunked_array([pa.array(told, pa.string())]), why)


@dataclass
class Admission:
    """What one batch of records brought."""

    events: pa.Table
    """First arrivals, EVENTS_SCHEMA."""
    superseded: list[tuple[Place, Place]]
    """(loser, earlier): an event admitted before now, and the earlier arrival of its id, read now, that it repeats."""
    num_duplicates: int
    num_dead: int


@dataclass
class Arrivals:
    """The duplicate memory: of each event_id its arrivals (landed_at, log_partition, log_offset), in that order, however
    they were read. An arrival counts unless the one before it landed within H; so one that is read late can only take the place
    of the one after it."""

    _known: dict[str, tuple[tuple[int, int, int], ...]] = field(default_factory=dict)
    """Tuples of numbers, which the garbage collector lets go of: millions of lists would make its pauses long."""
    _by_age: deque[tuple[int, str]] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self._known)

    def admit(self, records: pa.Table) -> Admission:
        """Splits records (EVENTS_SCHEMA, each partition in order) into first arrivals and the rest."""
        why = reasons(records)
        alive = pc.and_(pc.is_null(why), pc.not_equal(records["event_type"], HEARTBEAT))
        num_dead = len(why) - why.null_count
        events = records.filter(alive)
        landed_at = events["landed_at"].cast(pa.int64()).to_pylist()
        places = zip(events["log_partition"].to_pylist(), events["log_offset"].to_pylist(), strict=True)
        superseded: list[tuple[Place, Place]] = []
        wins = []
        for event_id, landed_us, place in zip(events["event_id"].to_pylist(), landed_at, places, strict=True):
            wins.append(self._admit(event_id, (landed_us, *place), superseded))
        admitted = events if all(wins) else events.filter(pa.array(wins, pa.bool_()))
        return Admission(admitted, superseded, len(wins) - admitted.num_rows, num_dead)

    def _admit(self, event_id: str, arrival: tuple[int, int, int], superseded: list[tuple[Place, Place]]) -> bool:
        self._by_age.append((arrival[0], event_id))
        others = self._known.get(event_id, ())
        at = bisect_left(others, arrival)
        before, after = (others[at - 1] if at else None), (others[at] if at < len(others) else None)
        self._known[event_id] = (*others[:at], arrival, *others[at:])
        if after is not None and _counts(after, before) and not _counts(after, arrival):
            superseded.append((after[1:], arrival[1:]))
        return _counts(arrival, before)

    def forget_before(self, read_through_us: int) -> None:
        """Drops arrivals more than H before an instant that every partition has been read past."""
        oldest_us = read_through_us - DUPLICATE_MEMORY_US
        while self._by_age and self._by_age[0][0] < oldest_us:
            _, event_id = self._by_age.popleft()
            recent = tuple(arrival for arrival in self._known.get(event_id, ()) if arrival[0] >= oldest_us)
            if recent:
                self._known[event_id] = recent
            else:
                self._known.pop(event_id, None)


def _counts(arrival: tuple[int, int, int], before: tuple[int, int, int] | None) -> bool:
    """Whether an arrival is no duplicate. before: the one of its id just before it, if any."""
    return before is None or arrival[0] - before[0] > DUPLICATE_MEMORY_US
