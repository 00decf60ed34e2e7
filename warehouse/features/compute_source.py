"""Where a group's rows are, and what of them a spine needs: blocks and events as Arrow, for the arrays of `compute`."""

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import pyarrow as pa

from warehouse.features.compute_spine import Span
from warehouse.features.declarations import FeatureGroup
from warehouse.features.measures import Measure
from warehouse.features.render import calendar_sql

STAGING = "staging"
SHADOWED = f"{STAGING}.stg_shadowed_arrivals"
RETRACTIONS = f"{STAGING}.stg_retractions"
_ROWS_AT_ONCE = 1_000_000
_INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT")


@dataclass(frozen=True)
class Relations:
    """Where a group's rows are, by the names that a DuckDB connection knows."""

    blocks: str
    hours: str
    days: str
    events: str
    shadowed: str
    retractions: str

    @classmethod
    def of(cls, group: FeatureGroup) -> "Relations":
        blocks = f"features.{group.name}"
        return cls(blocks, f"{blocks}_1h", f"{blocks}_1d", f"{STAGING}.{group.events}", SHADOWED, RETRACTIONS)

    def names(self) -> tuple[str, ...]:
        return (self.blocks, self.hours, self.days, self.events, self.shadowed, self.retractions)


class Source:
    """Reads a group's rows into Arrow, no more of them than the span of the spine needs."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, group: FeatureGroup, relations: Relations, span: Span):
        self.connection, self.group, self.relations, self.span = connection, group, relations, span
        self._longest_us = max(window.length_us for measure in group.measures for window in measure.windows)

    def suitable(self) -> tuple[Measure, ...]:
        """The measures that arrays can answer, for keys that no retraction touches. None where a relation has columns that may
        give its rows a meaning that only the SQL knows."""
        representations = {column for measure in self.group.measures for column in measure.columns}
        blocks = self._columns(self.relations.blocks) - {
            *self.group.keys,
            "block_start",
            "known_at",
            "is_rebuilt",
            *representations,
        }
        if any(column.startswith(("rebuilt", "is_", "retract")) for column in blocks):
            return ()
        known = [m for m in self.group.measures if not m.has_sessions and not m.bucket_by]
        of_blocks = [m for m in known if m.freshness == "block" and (is_extreme(m) or m.is_invertible)]
        of_events = [m for m in known if m.freshness == "event" or is_events(m)]
        if of_events and not any(column.startswith("retract") for column in self._columns(self.relations.events)):
            integral = self._integral(of_events)
            of_events = [m for m in of_events if is_events(m) or is_extreme(m) or (m.is_invertible and m.name in integral)]
        else:
            of_events = []
        return tuple(measure for measure in self.group.measures if measure in of_blocks or measure in of_events)

    def touched_keys(self) -> pa.Table:
        """The distinct keys of events that a retraction names: the only ones with rebuilt blocks, or with events that do not
        count."""
        keys = self.group.keys
        return self.connection.execute(
            f"select distinct {', '.join(keys)} from {self._events} "
            f"where event_id in (select retracts from {self.relations.retractions}) "
            f"and {' and '.join(f'{key} is not null' for key in keys)}"
        ).to_arrow_table()

    @property
    def _events(self) -> str:
        """The staged events, with the calendar keys of the group."""
        items = ", ".join(f"{calendar_sql(part, 'event_ts')} as {part.name}" for part in self.group.calendar)
        return f"(select *, {items} from {self.relations.events})" if items else self.relations.events

    def _columns(self, relation: str) -> frozenset[str]:
        return frozenset(row[0] for row in self.connection.execute(f"describe {relation}").fetchall())

    def _integral(self, measures: Sequence[Measure]) -> set[str]:
        """Measures whose events add up as integers: a rounded sum is not the sum of what was rounded."""
        names = {measure.name for measure in measures if measure.of is None or measure.aggregation == "count"}
        given = [measure for measure in measures if measure.of is not None]
        if given:
            items = ", ".join(f"({measure.of}) as m{number}" for number, measure in enumerate(given))
            described = self.connection.execute(f"describe select {items} from {self.relations.events}").fetchall()
            names |= {measure.name for measure, row in zip(given, described, strict=True) if row[1] in _INTEGERS}
        return names

    def blocks(self, columns: Sequence[str]) -> tuple[int, pa.RecordBatchReader]:
        """How many 5-minute rows are in reach; and their keys, `block_us`, `known_us` and the columns, batch by batch."""
        rows = (
            f"{self.relations.blocks} where block_start >= {_instant(self.span.first_us - self._longest_us)} "
            f"and known_at <= {_instant(max(self.span.last_known_us, self.span.last_request_us))}"
        )
        number = self.connection.execute(f"select count(*) from {rows}").fetchall()[0][0]
        items = [*self.group.keys, *columns, "epoch_us(block_start) as block_us", "epoch_us(known_at) as known_us"]
        return number, self.connection.execute(f"select {', '.join(items)} from {rows}").to_arrow_reader(_ROWS_AT_ONCE)

    def events(self, items: Sequence[str], condition: str, first_us: int) -> pa.Table:
        """The keys, `event_us`, `landed_us`, `known_us` and the items of events in reach, from `first_us` on."""
        keys = self.group.keys
        return self.connection.execute(
            f"select {', '.join((*keys, *items))}, epoch_us(event_ts) as event_us, epoch_us(landed_at) as landed_us, "
            f"epoch_us(known_at) as known_us from {self._events} "
            f"where {' and '.join(f'{key} is not null' for key in keys)} and ({condition}) "
            f"and known_at > {_instant(first_us)} and event_ts < {_instant(self.span.last_request_us)}"
        ).to_arrow_table()

    @property
    def first_event_us(self) -> int:
        return self.span.first_us - self._longest_us


def _instant(instant_us: int) -> str:
    return f"make_timestamptz({instant_us})"


def is_events(measure: Measure) -> bool:
    """Whether the arrays answer it from events, in their order."""
    return measure.aggregation in ("first", "last", "first_n", "last_n")


def state_columns(group: FeatureGroup) -> int:
    """How many columns of the group's block rows are held while its features are computed; range extremes are four."""
    return sum(4 if is_extreme(measure) else len(measure.columns) for measure in group.measures if not measure.is_sequence)


def is_extreme(measure: Measure) -> bool:
    return measure.aggregation in ("min", "max")


def condition_of(measure: Measure) -> str:
    parts = [f"({measure.where})"] if measure.where else []
    parts += [f"({measure.of}) is not null"] if measure.of else []
    return " and ".join(parts) or "true"


def event_items(measure: Measure) -> list[str]:
    """Select items of one event's representation, under the names of the block columns."""
    condition = condition_of(measure)
    if measure.aggregation == "count":
        return [f"case when {condition} then 1::bigint else 0::bigint end as {measure.name}"]
    if is_extreme(measure):
        return [f"case when {condition} then cast(({measure.of}) as {measure.type}) end as {measure.name}"]
    total, number = (*measure.columns, None)[:2]
    items = [f"case when {condition} then cast(({measure.of}) as bigint) else 0::bigint end as {total}"]
    return items if number is None else [*items, f"case when {condition} then 1::bigint else 0::bigint end as {number}"]


def as_type(values: pa.Array | pa.ChunkedArray, of: pa.DataType) -> pa.Array:
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    values = values if values.type == of else values.cast(of)
    if pa.types.is_list(of) and values.null_count:  # an empty window is an empty list
        values = pa.array([entry or [] for entry in values.to_pylist()], of)
    return values
