"""Answers reads for a plan: every measure by SQL or by arrays, then the derived features.

Arrays take exact sums (count, sum and avg of integers), min, max, first, last, first_n and last_n; sums of doubles, which are
covered and never subtracted, moments, maps, sessions and whatever a relation holds that arrays do not know, go through the SQL
of `point_in_time`. So do the reads of keys that a retraction has touched (they are few, and what it did to their blocks the SQL
knows), and those of fresh features at a log position.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from warehouse.events import TIMESTAMP
from warehouse.features.compute_arrays import (
    BlockArrays,
    EventArrays,
    Extreme,
    HeadArrays,
    KeyCodes,
    add_pairs,
    block_index,
)
from warehouse.features.compute_plan import Plan, inputs_of, type_of
from warehouse.features.compute_spine import REQUEST_TS, Reads, Span
from warehouse.features.declarations import FeatureGroup
from warehouse.features.measures import Measure
from warehouse.features.render import calendar_sql, point_in_time_sql
from warehouse.time_algebra import FIVE_MINUTES_US, GRACE_US

STAGING = "staging"
SHADOWED = f"{STAGING}.stg_shadowed_arrivals"
RETRACTIONS = f"{STAGING}.stg_retractions"
STAGED_COLUMNS = frozenset(("event_ts", "event_id", "landed_at", "known_at"))
FEATURES_BY_SQL = 100
"""One query answers no more: its cost grows faster than they do (1,000 took 53 s and 5.9 GB, now 4.6 s and 0.7)."""
_POSITION = pa.list_(pa.int64())
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


class Engine:
    """Answers chunks of reads for a plan, over relations that a DuckDB connection knows.

    arrays=False takes SQL for every measure: slower, and what the arrays are held equal to.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        relations: Mapping[str, Relations],
        what: Plan,
        span: Span,
        arrays: bool = True,
    ):
        self._types = what.types()
        self._groups = [_GroupEngine(connection, group, relations[group.name], span, arrays) for group in what.groups]

    def columns(self, reads: Reads) -> dict[str, pa.Array]:
        """The plan's features for each read, in the plan's order and types."""
        found: dict[str, pa.Array] = {}
        for group in self._groups:
            found |= group.columns(reads, self._types)
        return {name: found[name] for name in self._types}


def _cast(values: pa.Array | pa.ChunkedArray, of: pa.DataType) -> pa.Array:
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    values = values if values.type == of else values.cast(of)
    if pa.types.is_list(of) and values.null_count:  # an empty window is an empty list
        values = pa.array([entry or [] for entry in values.to_pylist()], of)
    return values


def _some_at_a_time(measures: Sequence[Measure]) -> Iterator[list[Measure]]:
    """The measures in order, as many together as have FEATURES_BY_SQL features, at least one."""
    some: list[Measure] = []
    for measure in measures:
        if some and sum(len(one.windows) for one in (*some, measure)) > FEATURES_BY_SQL:
            yield some
            some = []
        some.append(measure)
    if some:
        yield some


def _with_calendar(connection: duckdb.DuckDBPyConnection, group: FeatureGroup, reads: Reads) -> Reads:
    """The questions with the calendar keys of the group: parts of each t."""
    if not group.calendar:
        return reads
    connection.register("compute_times", pa.table({REQUEST_TS: pa.array(reads.request_us).cast(TIMESTAMP)}))
    items = ", ".join(f"{calendar_sql(part, REQUEST_TS)} as {part.name}" for part in group.calendar)
    parts = connection.execute(f"select {items} from compute_times").to_arrow_table()
    connection.unregister("compute_times")
    return replace(reads, keys=reads.keys | {name: _cast(parts[name], pa.string()) for name in parts.column_names})


class _GroupEngine:
    """One group's measures, each by the way that suits it, then its derived features."""

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, group: FeatureGroup, relations: Relations, span: Span, arrays: bool
    ):
        self._connection, self._group, self._relations = connection, group, relations
        source = Source(connection, group, relations, span)
        by_arrays = source.suitable() if arrays else ()
        self._by_sql = tuple(measure for measure in group.measures if measure not in by_arrays)
        self._parts: list[_Windows | _Events] = []
        if windows := [measure for measure in by_arrays if not _is_events(measure)]:
            self._parts.append(_Windows(source, windows))
        self._parts += [_Events(source, measure) for measure in by_arrays if _is_events(measure)]
        self._touched = None
        self._by_sql_alone = _GroupEngine(connection, group, relations, span, arrays=False) if self._parts else None
        if self._parts and (touched := source.touched_keys()).num_rows:
            self._touched = KeyCodes(touched.columns)

    def columns(self, reads: Reads, types: Mapping[str, pa.DataType]) -> dict[str, pa.Array]:
        """Features by full name; those that `types` names are of its types."""
        reads = _with_calendar(self._connection, self._group, reads)
        found = self._columns(reads)
        found = {name: _cast(values, types[name]) for name, values in found.items() if name in types}
        rows = self._beyond_arrays(reads)
        if self._by_sql_alone is None or not len(rows):
            return found
        instead = self._by_sql_alone.columns(reads.take(rows), types)
        place = np.arange(len(reads))
        place[rows] = len(reads) + np.arange(len(rows))
        return {name: pa.concat_arrays([values, instead[name]]).take(pa.array(place)) for name, values in found.items()}

    def _beyond_arrays(self, reads: Reads) -> np.ndarray:
        """Rows whose keys a retraction touches, and those that know a log position where something fresh is asked for."""
        beyond = np.zeros(len(reads), bool)
        if self._touched is not None:
            beyond |= self._touched.look_up([reads.keys[key] for key in self._group.keys]) >= 0
        if reads.known_position is not None and any(measure.freshness == "event" for measure in self._group.measures):
            beyond |= reads.known_position.is_valid().to_numpy(zero_copy_only=False)
        return np.flatnonzero(beyond)

    def _columns(self, reads: Reads) -> dict[str, pa.Array]:
        plain: dict[str, pa.Array] = {}
        for part in self._parts:
            plain |= part.columns(reads)
        if self._by_sql:
            plain |= self._from_sql(reads)
        found = {f"{self._group.entity}_{name}": values for name, values in plain.items()}
        return found | self._derived(plain, len(reads))

    def _from_sql(self, reads: Reads) -> dict[str, pa.Array]:
        found: dict[str, pa.Array] = {}
        for measures in _some_at_a_time(self._by_sql):
            found |= self._measures_from_sql(measures, reads)
        return found

    def _measures_from_sql(self, measures: Sequence[Measure], reads: Reads) -> dict[str, pa.Array]:
        group = replace(self._group, measures=tuple(measures), derived=())
        spine = pa.table(
            {
                "row_id": pa.array(np.arange(len(reads))),
                **{key: reads.keys[key] for key in group.entity_keys},
                REQUEST_TS: pa.array(reads.request_us).cast(TIMESTAMP),
                "feature_watermark": pa.array(reads.tick_us).cast(TIMESTAMP),
                "known_at": pa.array(reads.known_us).cast(TIMESTAMP),
                "known_position": pa.nulls(len(reads), _POSITION) if reads.known_position is None else reads.known_position,
            }
        )
        relations = self._relations
        sql = point_in_time_sql(
            group,
            "compute_spine",
            blocks=relations.blocks,
            hours=relations.hours,
            days=relations.days,
            events=relations.events,
            shadowed=relations.shadowed,
            retractions=relations.retractions,
        )
        self._connection.register("compute_spine", spine)
        answers = self._connection.execute(
            f"select * exclude (row_id) from ({sql}) as answers order by row_id"
        ).to_arrow_table()
        self._connection.unregister("compute_spine")
        return {name.removeprefix(f"{group.entity}_"): answers[name] for name in answers.column_names}

    def _derived(self, plain: Mapping[str, pa.Array], num_reads: int) -> dict[str, pa.Array]:
        if not self._group.derived:
            return {}
        inputs = {name: plain[name] for name in sorted(inputs_of(self._group.derived))}
        self._connection.register("compute_plain", pa.table({"row_id": pa.array(np.arange(num_reads)), **inputs}))
        items = ", ".join(
            f"cast({derived.sql} as double) as {self._group.entity}_{derived.name}" for derived in self._group.derived
        )
        answers = self._connection.execute(f"select {items} from compute_plain order by row_id").to_arrow_table()
        self._connection.unregister("compute_plain")
        return {name: answers[name] for name in answers.column_names}


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
        of_blocks = [m for m in known if m.freshness == "block" and (_is_extreme(m) or m.is_invertible)]
        of_events = [m for m in known if m.freshness == "event" or _is_events(m)]
        if of_events and not any(column.startswith("retract") for column in self._columns(self.relations.events)):
            integral = self._integral(of_events)
            of_events = [m for m in of_events if _is_events(m) or _is_extreme(m) or (m.is_invertible and m.name in integral)]
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

    def blocks(self, columns: Sequence[str]) -> pa.Table:
        """The keys, `block_us`, `known_us` and the columns of the 5-minute rows in reach."""
        return self.connection.execute(
            f"select {', '.join((*self.group.keys, *columns))}, "
            f"epoch_us(block_start) as block_us, epoch_us(known_at) as known_us from {self.relations.blocks} "
            f"where block_start >= {_instant(self.span.first_us - self._longest_us)} "
            f"and known_at <= {_instant(max(self.span.last_known_us, self.span.last_request_us))}"
        ).to_arrow_table()

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


def _is_events(measure: Measure) -> bool:
    """Whether the arrays answer it from events, in their order."""
    return measure.aggregation in ("first", "last", "first_n", "last_n")


def state_columns(group: FeatureGroup) -> int:
    """How many columns of the group's block rows are held while its features are computed."""
    return sum(len(measure.columns) for measure in group.measures if not measure.is_sequence)


def _is_extreme(measure: Measure) -> bool:
    return measure.aggregation in ("min", "max")


def _condition(measure: Measure) -> str:
    parts = [f"({measure.where})"] if measure.where else []
    parts += [f"({measure.of}) is not null"] if measure.of else []
    return " and ".join(parts) or "true"


def _event_items(measure: Measure) -> list[str]:
    """Select items of one event's representation, under the names of the block columns."""
    condition = _condition(measure)
    if measure.aggregation == "count":
        return [f"case when {condition} then 1::bigint else 0::bigint end as {measure.name}"]
    if _is_extreme(measure):
        return [f"case when {condition} then cast(({measure.of}) as {measure.type}) end as {measure.name}"]
    total, number = (*measure.columns, None)[:2]
    items = [f"case when {condition} then cast(({measure.of}) as bigint) else 0::bigint end as {total}"]
    return items if number is None else [*items, f"case when {condition} then 1::bigint else 0::bigint end as {number}"]


@dataclass(frozen=True)
class _Edges:
    """Where windows lie in event time and what blocks they read: microseconds, int64 [N]."""

    anchor_us: np.ndarray
    upper_us: np.ndarray
    known_us: np.ndarray

    @classmethod
    def of(cls, measure: Measure, reads: Reads) -> "_Edges":
        request_tick_us = reads.request_us // FIVE_MINUTES_US * FIVE_MINUTES_US
        if measure.freshness == "event":
            return cls(request_tick_us, reads.tick_us, reads.tick_us)
        anchor_us = request_tick_us if measure.anchor == "request" else reads.tick_us
        return cls(anchor_us, np.minimum(reads.tick_us, reads.known_us), reads.known_us)

    def lower_us(self, length_us: int) -> np.ndarray:
        return np.minimum(self.anchor_us - length_us, self.upper_us)


def _family(measure: Measure) -> str:
    return "event" if measure.freshness == "event" else measure.anchor


class _Windows:
    """Counts, exact sums, averages, minima and maxima over windows of blocks, and of the head where they are fresh."""

    def __init__(self, source: Source, measures: Sequence[Measure]):
        self._measures, self._keys = measures, source.group.keys
        self._sum_columns = [column for m in measures if not _is_extreme(m) for column in m.columns]
        extremes = [measure for measure in measures if _is_extreme(measure)]
        rows = source.blocks([*self._sum_columns, *(measure.name for measure in extremes)])
        self._codes = KeyCodes([rows[key] for key in self._keys])
        self._blocks = BlockArrays(
            self._codes.codes,
            block_index(_numbers(rows, "block_us")),
            block_index(_numbers(rows, "known_us")),
            [_numbers(rows, column) for column in self._sum_columns],
            {measure.name: (*_values(rows, measure), measure.aggregation == "max") for measure in extremes},
        )
        fresh = [measure for measure in measures if measure.freshness == "event"]
        self._head = _Head(source, fresh) if fresh else None

    def columns(self, reads: Reads) -> dict[str, pa.Array]:
        codes = self._codes.look_up([reads.keys[key] for key in self._keys])
        found: dict[str, pa.Array] = {}
        for family in dict.fromkeys(map(_family, self._measures)):
            measures = [measure for measure in self._measures if _family(measure) == family]
            head = self._head.of(reads) if self._head is not None and family == "event" else None
            edges = _Edges.of(measures[0], reads)
            known, upper = block_index(edges.known_us), block_index(edges.upper_us)
            sums = [measure for measure in measures if not _is_extreme(measure)]
            lengths = {window.length_us: window.name for measure in sums for window in measure.windows}
            lowers = {length: block_index(edges.lower_us(length)) for length in lengths}
            totals = self._blocks.sums(codes, known, upper, list(lowers.values()))
            for length_us, columns in zip(lengths, totals, strict=True):
                total = dict(zip(self._sum_columns, columns, strict=True))
                if head is not None:
                    head.add(total, edges.anchor_us - length_us)
                for measure in sums:
                    for window in measure.windows:
                        if window.length_us == length_us:
                            found[f"{measure.name}_{window.name}"] = _finalized(measure, total)
            for measure in measures:
                if not _is_extreme(measure):
                    continue
                for window in measure.windows:
                    lower = block_index(edges.lower_us(window.length_us))
                    extreme = self._blocks.extreme(measure.name, codes, known, upper, lower)
                    if head is not None:
                        head.consider(extreme, measure, edges.anchor_us - window.length_us)
                    found[f"{measure.name}_{window.name}"] = _or_empty(measure, extreme.array())
        return found


def _finalized(measure: Measure, total: Mapping[str, np.ndarray]) -> pa.Array:
    first, *number = (total[column] for column in measure.columns)
    if not number:
        return pa.array(first)
    empty = number[0] == 0
    return _or_empty(measure, pa.array(first.astype(np.float64) / np.where(empty, 1, number[0]), mask=empty))


def _or_empty(measure: Measure, values: pa.Array) -> pa.Array:
    """The declared number where there is nothing."""
    if measure.empty is None:
        return values
    of = type_of(measure)
    return pc.fill_null(values.cast(of), pa.scalar(measure.empty).cast(of))


class _Head:
    """The events that fresh measures add to the blocks of tick T."""

    def __init__(self, source: Source, measures: Sequence[Measure]):
        self._keys = source.group.keys
        rows = source.events(
            [item for measure in measures for item in _event_items(measure)],
            " or ".join(f"({_condition(measure)})" for measure in measures),
            source.span.first_us,
        )
        self._codes = KeyCodes([rows[key] for key in self._keys])
        self._event_us = _numbers(rows, "event_us")
        self._sums = {column: _numbers(rows, column) for m in measures if not _is_extreme(m) for column in m.columns}
        self._extremes = {measure.name: _values(rows, measure) for measure in measures if _is_extreme(measure)}
        self._arrays = HeadArrays(self._codes.codes, self._event_us, _numbers(rows, "landed_us"), GRACE_US)

    def of(self, reads: Reads) -> "_HeadOfReads":
        codes = self._codes.look_up([reads.keys[key] for key in self._keys])
        found = list(self._arrays.pairs(codes, reads.request_us, reads.tick_us))
        return _HeadOfReads(found, self._event_us, self._sums, self._extremes)


@dataclass(frozen=True)
class _HeadOfReads:
    """Pairs of a read and an event of its head, and what the events weigh."""

    pairs: list[tuple[np.ndarray, np.ndarray]]
    event_us: np.ndarray
    sums: Mapping[str, np.ndarray]
    extremes: Mapping[str, tuple[np.ndarray, np.ndarray]]

    def add(self, total: Mapping[str, np.ndarray], lower_us: np.ndarray) -> None:
        """Adds the events at or after each read's lower edge; columns that are not fresh stay as they are."""
        for read_X, row_X in self.pairs:
            inside = self.event_us[row_X] >= lower_us[read_X]
            read, row = read_X[inside], row_X[inside]
            for column, value in self.sums.items():
                add_pairs(total[column], read, value[row])

    def consider(self, extreme: Extreme, measure: Measure, lower_us: np.ndarray) -> None:
        value, valid = self.extremes[measure.name]
        for read_X, row_X in self.pairs:
            inside = (self.event_us[row_X] >= lower_us[read_X]) & valid[row_X]
            extreme.take(read_X[inside], value[row_X[inside]])


class _Events:
    """The first or last n values of a window: read from events, which are fewer than the lists that blocks hold of them."""

    def __init__(self, source: Source, measure: Measure):
        self._measure, self._keys = measure, source.group.keys
        self._is_list = measure.is_sequence
        of = "varchar" if self._is_list else measure.type
        rows = source.events(["event_id", f"cast(({measure.of}) as {of}) as value"], _condition(measure), source.first_event_us)
        known = _numbers(rows, "landed_us" if measure.freshness == "event" else "known_us")
        self._codes = KeyCodes([rows[key] for key in self._keys])
        ids = _cast(rows["event_id"], pa.string())
        values = _cast(rows["value"], pa.string() if self._is_list else rows.schema.field("value").type)
        self._arrays = EventArrays(self._codes.codes, _numbers(rows, "event_us"), known, ids, values)

    def columns(self, reads: Reads) -> dict[str, pa.Array]:
        measure = self._measure
        assert measure.n is not None
        codes = self._codes.look_up([reads.keys[key] for key in self._keys])
        edges = _Edges.of(measure, reads)
        is_fresh = measure.freshness == "event"
        upper_us = reads.request_us if is_fresh else edges.upper_us
        limit_us = reads.request_us if is_fresh else edges.known_us + 1
        of_window = {
            window.name: self._arrays.lists(
                measure.n,
                codes,
                np.minimum(edges.anchor_us - window.length_us, upper_us),
                upper_us,
                limit_us,
                from_oldest=measure.aggregation in ("first", "first_n"),
            )
            for window in measure.windows
        }
        if self._is_list:
            return {f"{measure.name}_{name}": lists for name, lists in of_window.items()}
        return {f"{measure.name}_{name}": _or_empty(measure, _only(lists)) for name, lists in of_window.items()}


def _only(lists: pa.ListArray) -> pa.Array:
    """The entry of lists of at most one, NULL of empty ones."""
    lengths = np.diff(lists.offsets.to_numpy())
    place = pa.array(lists.offsets.to_numpy()[:-1].astype(np.int64), mask=lengths == 0)
    return lists.values.take(place)


def _numbers(rows: pa.Table, column: str) -> np.ndarray:
    return rows[column].to_numpy().astype(np.int64, copy=False)


def _values(rows: pa.Table, measure: Measure) -> tuple[np.ndarray, np.ndarray]:
    """Values (0 where NULL) and which are not NULL."""
    column = rows[measure.name]
    dtype = np.float64 if measure.type == "double" else np.int64
    return column.fill_null(0).to_numpy().astype(dtype, copy=False), column.is_valid().to_numpy()
