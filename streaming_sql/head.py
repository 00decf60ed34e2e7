"""The head of one feature group: every event of the log that no block of the tick holds yet, by key.

Lists are append-only and each tick begins a new head. What a view sees is decided by its position alone, so the views of one
tick share a head, and a request sees exactly one K. Knows nothing of blocks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from streaming_sql.key_index import Key
from streaming_sql.retractions import Place, Retraction, is_below
from warehouse.features import sketches
from warehouse.features.declarations import FeatureGroup
from warehouse.features.measures import CALENDAR_PARTS, Measure


@dataclass(slots=True)
class HeadEvent:
    """One event of one key. `values` has one item per fresh measure: None where the event is not in its set, (entry, numbers)
    of a map, an entry of text being its code once a store has the event."""

    event_ts: int
    event_id: str
    known_at: int
    landed_us: int
    log_partition: int
    log_offset: int
    values: tuple[Any, ...]
    superseded_by: Place | None = None
    """Where an earlier arrival of the same event_id was read later (a lagging partition): views that know it see it instead."""
    retractions: tuple[Retraction, ...] = ()
    """Those that hold for this arrival: views that know one of them do not see it."""

    def is_visible(self, position: Sequence[int]) -> bool:
        if not is_below((self.log_partition, self.log_offset), position):
            return False
        if self.superseded_by is not None and is_below(self.superseded_by, position):
            return False
        return not any(retraction.is_known(position) for retraction in self.retractions)


class Head:
    """Events by key, and by place in the log."""

    def __init__(self, events: Iterable[tuple[Key, HeadEvent]] = ()):
        self._of_key: dict[Key, list[HeadEvent]] = {}
        self._at: dict[Place, tuple[Key, HeadEvent]] = {}
        self._of_id: dict[str, tuple[Place, ...]] = {}
        for key, event in events:
            self.add(key, event)

    def __len__(self) -> int:
        return len(self._at)

    def events(self) -> list[tuple[Key, HeadEvent]]:
        """Every event that is here, whoever sees it."""
        return list(self._at.values())

    def add(self, key: Key, event: HeadEvent) -> None:
        self._of_key.setdefault(key, []).append(event)
        place = event.log_partition, event.log_offset
        self._of_id[event.event_id] = (*self._of_id.get(event.event_id, ()), place)
        self._at[place] = (key, event)

    def supersede(self, loser: Place, winner: Place) -> None:
        """The event at `loser` counts only for views that do not know `winner`."""
        if loser in self._at:
            self._at[loser][1].superseded_by = winner

    def retract(self, retraction: Retraction) -> None:
        """Arrivals of its target that are here, and that it holds for, count only for views that do not know it."""
        for place in self._of_id.get(retraction.retracts, ()):
            _, event = self._at[place]
            if retraction.holds_for(event.landed_us):
                event.retractions = (*event.retractions, retraction)

    def after(self, tick_us: int) -> "Head":
        """A new head without what the blocks of `tick_us` hold; views of this one keep theirs."""
        return Head(item for item in self.events() if item[1].known_at > tick_us)

    def split(self, landed_from_us: int) -> tuple["Head", int]:
        """A new head of what landed from then on, and the latest known_at of the rest, 0 if there is none."""
        events = self.events()
        dropped = (event.known_at for _, event in events if event.landed_us < landed_from_us)
        return Head(item for item in events if item[1].landed_us >= landed_from_us), max(dropped, default=0)

    def visible(self, key: Key, position: Sequence[int], before_us: int) -> list[HeadEvent]:
        """The key's events below the position, with event_ts < before_us."""
        events = self._of_key.get(key)
        if not events:
            return []
        return [event for event in list(events) if event.event_ts < before_us and event.is_visible(position)]


def head_sql(group: FeatureGroup, fresh: Sequence[Measure], events: str) -> str:
    """DuckDB `select` of one row per event that is in the set of at least one fresh measure: keys, place, times, then of each
    measure what `head_events` makes its value of, NULL where the event is not in its set."""
    items, conditions = [], []
    for measure in fresh:
        given = [text for text in (measure.of, measure.bucket_by) if text]
        condition = " and ".join([f"({measure.where})"] * bool(measure.where) + [f"({text}) is not null" for text in given])
        conditions.append(condition or "true")
        items.append(f"case when {condition or 'true'} then {_measured(measure)} end as {measure.name}")
    keys = ", ".join(f"{of_event} as {name}" for name, of_event in key_sql(group).items())
    known = " and ".join(f"{key} is not null" for key in group.entity_keys)
    return (
        f"select {keys}, epoch_us(event_ts) as head_event_ts, event_id as head_event_id, epoch_us(known_at) as head_known_at, "
        f"epoch_us(landed_at) as head_landed_at, log_partition as head_partition, log_offset as head_offset, "
        f"{', '.join(items)} "
        f"from {events} where {known} and ({' or '.join(f'coalesce({one}, false)' for one in conditions)})"
    )


def key_sql(group: FeatureGroup) -> dict[str, str]:
    """Key column of the group's blocks → the DuckDB expression that gives it of an event."""
    parts = {
        part.name: f"cast(extract({CALENDAR_PARTS[part.part]} from event_ts at time zone '{part.zone}') as varchar)"
        for part in group.calendar
    }
    return {key: parts.get(key, key) for key in group.keys}


def _measured(measure: Measure) -> str:
    if measure.aggregation == "count":
        value = "true"
    else:
        value = f"cast({measure.of} as {measure.type})"
        if measure.representation == "events" and measure.type != "varchar":
            value = f"cast({value} as varchar)"
    return f"{{bucket: cast({measure.bucket_by} as varchar), value: {value}}}" if measure.bucket_by else value


def _as_value(measure: Measure, found: Any) -> Any:
    """What a head event holds of a measure: of a map (entry, numbers), else what the SQL gives."""
    if found is None or measure.representation != "map":
        return found
    if measure.bucket_by:
        number = 1 if measure.aggregation == "count" else found["value"]
        return found["bucket"], (number, 1) if measure.aggregation == "avg" else (number,)
    if measure.aggregation == "approx_quantile":
        return sketches.bucket_of(found, measure.bounds), (1,)
    if measure.aggregation == "approx_count_distinct":
        register, rank = sketches.register_and_rank(found)
        return register, (rank,)
    return found, (1,)


def head_events(group: FeatureGroup, fresh: Sequence[Measure], rows: pa.Table) -> list[tuple[Key, HeadEvent]]:
    """The rows of `head_sql` as (key, event)."""
    if rows.num_rows == 0:
        return []
    columns = [column.to_pylist() for column in rows.columns]
    num_keys = len(group.keys)
    keys, facts, values = columns[:num_keys], columns[num_keys : num_keys + 6], columns[num_keys + 6 :]
    values = [
        [_as_value(measure, value) for value in column] if measure.representation == "map" else column
        for measure, column in zip(fresh, values, strict=True)
    ]
    return [
        (key, HeadEvent(event_ts, event_id, known_at, landed_us, partition, offset, measured))
        for key, (event_ts, event_id, known_at, landed_us, partition, offset), measured in zip(
            zip(*keys, strict=True), zip(*facts, strict=True), zip(*values, strict=True), strict=True
        )
    ]
