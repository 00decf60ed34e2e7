"""The promise, checked: every feature value that was served is computed again from the lake and compared.

A vector is one group's features of one key in one logged request. Values of integer measures and sequences must be equal,
averages, other doubles and derived values within 1e-9 relative. Knows nothing of models or pages.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from serving.forward_log import FORWARD_LOG
from streaming_sql.block_views import READER
from streaming_sql.cluster import STALE
from streaming_sql.records import to_us
from streaming_sql.short_head import SHORT
from warehouse.errors import HeadraceError
from warehouse.events import TIMESTAMP
from warehouse.features.declarations import FeatureGroup, declarations_hash, load_groups
from warehouse.features.kinds.declared import Kinds, TableFeatures, load_kinds
from warehouse.features.kinds.table_compute import recompute_table
from warehouse.features.recompute import recompute
from warehouse.lake import BUILT_UNTIL, Lake
from warehouse.landing import landed_position
from warehouse.time_algebra import FIVE_MINUTES_US, floor_5m

TOLERANCE = 1e-9
SMALLEST = 1e-12
"""Doubles this near to each other are equal: a variance of equal numbers may be anything that rounds to 0."""
FIRST_DIFFERENCES = 10
_COMPARED = ("note_id", "author_id", "features", "sequences", "maps")
"""What is read of a candidate."""
RETRACTIONS = "staging.stg_retractions"
_SPINE_TIMES = pa.schema(
    [
        pa.field("row_id", pa.int64()),
        pa.field("request_ts", TIMESTAMP),
        pa.field("feature_watermark", TIMESTAMP),
        pa.field("known_position", pa.list_(pa.int64())),
    ]
)


@dataclass(frozen=True)
class Difference:
    """One value that does not agree."""

    request_id: str
    group: str
    keys: tuple[str, ...]
    feature: str
    logged: Any
    recomputed: Any

    def __str__(self) -> str:
        key = ", ".join(self.keys)
        where = f"request {self.request_id}: {self.feature} of {self.group} ({key})"
        return f"{where} was served as {self.logged}, the lake says {self.recomputed}"


@dataclass
class Parity:
    """How many vectors and values agree, and which do not. `skipped` counts vectors that cannot be compared, by reason."""

    num_requests: int = 0
    num_vectors: int = 0
    num_equal_vectors: int = 0
    num_values: int = 0
    num_equal_values: int = 0
    vectors_of_group: Counter = field(default_factory=Counter)
    differences_of_feature: Counter = field(default_factory=Counter)
    differences: list[Difference] = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)

    @property
    def agrees(self) -> bool:
        return self.num_equal_values == self.num_values

    def as_dict(self) -> dict[str, Any]:
        return {
            "requests": self.num_requests,
            "vectors": self.num_vectors,
            "equalVectors": self.num_equal_vectors,
            "values": self.num_values,
            "equalValues": self.num_equal_values,
            "vectorsOfGroup": dict(self.vectors_of_group),
            "differencesOfFeature": dict(self.differences_of_feature),
            "firstDifferences": [str(difference) for difference in self.differences],
            "skippedVectors": dict(self.skipped),
        }

    def as_text(self) -> str:
        lines = [
            f"{self.num_equal_vectors:,} of {self.num_vectors:,} logged feature vectors agree with the lake "
            f"({self.num_equal_values:,} of {self.num_values:,} values, {self.num_requests:,} requests)"
        ]
        lines += [f"  {name}: {count:,} vectors" for name, count in self.vectors_of_group.items()]
        lines += [f"  not compared: {count:,} vectors, {reason}" for reason, count in self.skipped.items()]
        if self.differences:
            lines.append("differences by feature:")
            lines += [f"  {name}: {count:,}" for name, count in self.differences_of_feature.most_common()]
            lines.append("the first ones:")
            lines += [f"  {difference}" for difference in self.differences]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Vector:
    request: Mapping[str, Any]
    keys: tuple[str, ...]
    values: Mapping[str, float | None]
    sequences: Mapping[str, list[str] | None]
    maps: Mapping[str, Mapping[str, float] | None]


def check_parity(
    lake: Lake, last: int | None = None, groups: Mapping[str, FeatureGroup] | None = None, kinds: Kinds | None = None
) -> Parity:
    """Compares every logged value of the newest `last` requests (all by default) with the lake.

    Raises HeadraceError if nothing was logged.
    """
    groups = groups or load_groups()
    if not lake.exists(FORWARD_LOG):
        raise HeadraceError("nothing was served yet: the lake has no lake.forward_log; run `headrace serve` and ask for a feed")
    rows = lake.scan(FORWARD_LOG).sort_by([("request_ts", "descending"), ("request_id", "ascending")])
    rows = rows.slice(0, rows.num_rows if last is None else last)
    if rows.num_rows == 0:
        raise HeadraceError(
            "nothing was served yet: lake.forward_log is empty; ask for a feed, or wait some seconds for the writer"
        )
    parity = Parity(num_requests=rows.num_rows)
    requests = _as_python(rows)
    here = _Here(declarations_hash(dict(groups)), landed_position(lake), _built_until(lake, groups))
    for group in groups.values():
        comparable = []
        for vector in _vectors(group, requests):
            if reason := here.why_not(group, vector.request):
                parity.skipped[reason] += 1
            else:
                comparable.append(vector)
        if comparable:
            _compare(group, comparable, recompute(lake, group, _spine(group, comparable)), parity)
    for table in (kinds or load_kinds()).tables:
        logged = [request for request in requests if _was_logged(table, request)]
        parity.skipped[f"{table.name} was not declared when they were served"] += len(requests) - len(logged)
        if vectors := list(_vectors(table, logged)):
            _compare(table, vectors, recompute_table(lake, table, _spine(table, vectors)), parity)
    parity.skipped = +parity.skipped
    return parity


def _as_python(rows: pa.Table) -> list[dict[str, Any]]:
    """The rows; of the candidates, which are thousands, those that were logged with features."""
    requests: list[dict[str, Any]] = rows.drop_columns(["candidates"]).to_pylist(maps_as_pydicts="strict")
    lists = rows["candidates"].combine_chunks()
    is_logged = pc.is_valid(pc.struct_field(lists.flatten(), "features"))
    columns = {name: pc.struct_field(lists.flatten(), name).filter(is_logged) for name in _COMPARED}
    candidates = pa.table(columns).to_pylist(maps_as_pydicts="strict")
    for request in requests:
        request["candidates"] = []
    for place, candidate in zip(pc.list_parent_indices(lists).filter(is_logged).to_pylist(), candidates, strict=True):
        requests[place]["candidates"].append(candidate)
    return requests


def _was_logged(table: TableFeatures, request: Mapping[str, Any]) -> bool:
    """Whether the request's log holds the table's features; a log from before the declaration does not."""
    maps = [request["user_features"], *(candidate["features"] for candidate in request["candidates"])]
    return any(table.feature_names[0] in features for features in maps)


@dataclass(frozen=True)
class _Here:
    """How far the lake has come: what it can be asked about. built_until_us: exclusive, by table."""

    declared: str
    landed: Sequence[int]
    built_until_us: Mapping[str, int]

    def why_not(self, group: FeatureGroup, request: Mapping[str, Any]) -> str | None:
        """Why a request's values of this group cannot be computed again, or None if they can."""
        if request["declarations_hash"] != self.declared:
            return "features were defined otherwise when they were served"
        if self.built_until_us[f"features.{group.name}"] <= to_us(request["feature_watermark"]):
            return f"{group.name} is not built up to their watermark; run `dbt build`"
        if STALE in request["degraded"] and group.entity_keys[0] == READER:
            return "RisingWave did not answer, and the reader's own features were of an earlier tick"
        if all(measure.freshness == "block" for measure in group.measures):
            return None
        if SHORT in request["degraded"]:
            return "RisingWave was away for so long that events were left out of their head"
        if any(known > there for known, there in zip(request["known_position"], self.landed, strict=True)):
            return "events they had seen are not in the lake yet; a running server lands them within a minute"
        staged_until_us = min(self.built_until_us[name] for name in (f"staging.{group.events}", RETRACTIONS))
        if staged_until_us <= floor_5m(to_us(request["request_ts"])) + FIVE_MINUTES_US:
            return f"{group.events} is not built past their request; run `dbt build` once the next tick is closed"
        return None


def _built_until(lake: Lake, groups: Mapping[str, FeatureGroup]) -> dict[str, int]:
    """Of every table that recomputing reads: rows known before this are in it, microseconds; 0 if it is not there."""
    names = {f"features.{group.name}" for group in groups.values()} | {f"staging.{group.events}" for group in groups.values()}
    names.add(RETRACTIONS)
    there = {name: lake.table(name).properties.get(BUILT_UNTIL) for name in names if lake.exists(name)}
    return {name: to_us(text) if (text := there.get(name)) else 0 for name in names}


def _vectors(group: FeatureGroup | TableFeatures, requests: Iterable[Mapping[str, Any]]) -> Iterable[_Vector]:
    """The group's logged vectors: one per request for the reader's own, else one per distinct key of a request."""
    for request in requests:
        if group.entity_keys == ("user_id",):
            values = {name: request["user_features"][name] for name in group.feature_names}
            sequences = {name: request["user_sequences"][name] for name in group.sequence_names}
            maps = {name: request["user_maps"][name] for name in group.map_names}
            yield _Vector(request, (request["user_id"],), values, sequences, maps)
            continue
        told = set()
        for candidate in request["candidates"]:
            columns = {
                "user_id": request["user_id"],
                "note_id": candidate["note_id"],
                "author_id": candidate["author_id"],
            }
            keys = tuple(columns[key] for key in group.entity_keys)
            values = {name: candidate["features"][name] for name in group.feature_names}
            sequences = {name: candidate["sequences"][name] for name in group.sequence_names}
            maps = {name: candidate["maps"][name] for name in group.map_names}
            # an author shown twice in a request is one vector, if it was logged as one
            fingerprint = (keys, tuple(values.values()), repr((sequences, maps)) if sequences or maps else "")
            if fingerprint not in told:
                told.add(fingerprint)
                yield _Vector(request, keys, values, sequences, maps)


def _spine(group: FeatureGroup | TableFeatures, vectors: Sequence[_Vector]) -> pa.Table:
    times = pa.Table.from_pylist(
        [
            {
                "row_id": row,
                "request_ts": vector.request["request_ts"],
                "feature_watermark": vector.request["feature_watermark"],
                "known_position": vector.request["known_position"],
            }
            for row, vector in enumerate(vectors)
        ],
        schema=_SPINE_TIMES,
    )
    for place, key in enumerate(group.entity_keys):
        times = times.append_column(key, pa.array([vector.keys[place] for vector in vectors], pa.string()))
    return times


def _compare(group: FeatureGroup | TableFeatures, vectors: Sequence[_Vector], recomputed: pa.Table, parity: Parity) -> None:
    recomputed = recomputed.sort_by("row_id")
    if not recomputed["row_id"].combine_chunks().equals(pa.array(range(len(vectors)), recomputed["row_id"].type)):
        raise HeadraceError(f"recomputing {group.name} gave {recomputed.num_rows} rows for {len(vectors)} logged vectors")
    columns = {name: pc.cast(recomputed[name], pa.float64()).to_pylist() for name in group.feature_names} | {
        name: recomputed[name].to_pylist() for name in (*group.sequence_names, *group.map_names)
    }
    exact = _exact_features(group)
    for row, vector in enumerate(vectors):
        num_equal = 0
        logged_values: dict[str, Any] = {**vector.values, **vector.sequences, **vector.maps}
        for name, logged in logged_values.items():
            value = columns[name][row]
            if name in group.sequence_names:
                equal = list(logged or []) == list(value or [])
            elif name in group.map_names:
                equal = _same_map(dict(logged or {}), dict(value or {}), 0.0 if name in exact else TOLERANCE)
            else:
                equal = _same(logged, value, 0.0 if name in exact else TOLERANCE)
            num_equal += equal
            if not equal:
                parity.differences_of_feature[name] += 1
                if len(parity.differences) < FIRST_DIFFERENCES:
                    parity.differences.append(
                        Difference(vector.request["request_id"], group.name, vector.keys, name, logged, value)
                    )
        parity.num_vectors += 1
        parity.num_equal_vectors += num_equal == len(logged_values)
        parity.num_values += len(logged_values)
        parity.num_equal_values += num_equal
        parity.vectors_of_group[group.name] += 1


def _exact_features(group: FeatureGroup | TableFeatures) -> set[str]:
    """Names that must agree to the bit: everything of integers but averages, estimates of distinct counts, and what a table
    holds."""
    if isinstance(group, TableFeatures):
        return set(group.feature_names)
    return {
        f"{group.entity}_{measure.name}_{window.name}"
        for measure in group.measures
        if measure.type != "double" and measure.aggregation != "avg"
        for window in measure.windows
    }


def _same(logged: float | None, value: float | None, tolerance: float) -> bool:
    if logged is None or value is None:
        return logged is None and value is None
    return math.isclose(logged, value, rel_tol=tolerance, abs_tol=SMALLEST if tolerance else 0.0)


def _same_map(logged: Mapping[str, float], value: Mapping[str, float], tolerance: float) -> bool:
    return logged.keys() == value.keys() and all(_same(logged[entry], value[entry], tolerance) for entry in logged)
