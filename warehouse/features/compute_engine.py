"""Answers reads for a plan: every measure by SQL or by arrays, then the derived features.

Arrays take exact sums (count, sum and avg of integers), min, max, first, last, first_n and last_n; sums of doubles, which are
covered and never subtracted, moments, maps, sessions and whatever a relation holds that arrays do not know, go through the SQL
of `point_in_time`. So do the reads of keys that a retraction has touched (they are few, and what it did to their blocks the SQL
knows), and those of fresh features at a log position.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace

import duckdb
import numpy as np
import pyarrow as pa

from warehouse.events import TIMESTAMP
from warehouse.features.compute_arrays import KeyCodes
from warehouse.features.compute_plan import Plan, inputs_of
from warehouse.features.compute_source import Relations, Source, as_type, is_events
from warehouse.features.compute_spine import REQUEST_TS, Reads, Span
from warehouse.features.compute_windows import Events, Windows
from warehouse.features.declarations import FeatureGroup
from warehouse.features.measures import Measure
from warehouse.features.render import calendar_sql, point_in_time_sql

FEATURES_BY_SQL = 100
"""One query answers no more: its cost grows faster than they do (1,000 took 53 s and 5.9 GB, now 4.6 s and 0.7)."""
_POSITION = pa.list_(pa.int64())


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
    return replace(reads, keys=reads.keys | {name: as_type(parts[name], pa.string()) for name in parts.column_names})


class _GroupEngine:
    """One group's measures, each by the way that suits it, then its derived features."""

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, group: FeatureGroup, relations: Relations, span: Span, arrays: bool
    ):
        self._connection, self._group, self._relations = connection, group, relations
        source = Source(connection, group, relations, span)
        by_arrays = source.suitable() if arrays else ()
        self._by_sql = tuple(measure for measure in group.measures if measure not in by_arrays)
        self._parts: list[Windows | Events] = []
        if windows := [measure for measure in by_arrays if not is_events(measure)]:
            self._parts.append(Windows(source, windows))
        self._parts += [Events(source, measure) for measure in by_arrays if is_events(measure)]
        self._touched = None
        self._by_sql_alone = _GroupEngine(connection, group, relations, span, arrays=False) if self._parts else None
        if self._parts and (touched := source.touched_keys()).num_rows:
            self._touched = KeyCodes(touched.columns)

    def columns(self, reads: Reads, types: Mapping[str, pa.DataType]) -> dict[str, pa.Array]:
        """Features by full name; those that `types` names are of its types."""
        reads = _with_calendar(self._connection, self._group, reads)
        found = self._columns(reads)
        found = {name: as_type(values, types[name]) for name, values in found.items() if name in types}
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
        sql = point_in_time_sql(
            group,
            "compute_spine",
            **asdict(self._relations),
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
