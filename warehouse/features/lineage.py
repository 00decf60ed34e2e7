"""Where a feature comes from: source columns → measure → block tables → window → feature, and through derived features."""

from collections.abc import Mapping
from typing import Any

import sqlglot
from sqlglot import expressions as exp

from warehouse.features import sketches
from warehouse.features.compute_plan import inputs_of
from warehouse.features.declarations import FeatureGroup
from warehouse.features.meanings import block_tables
from warehouse.features.measures import Measure

EXACT = "exact: equal to the bit in every execution"
ROUNDED = "within rounding: 1e-9 relative between executions"


def lineage(group: FeatureGroup, feature: str) -> dict[str, Any]:
    """What a feature of the group is made of. source_columns: `model.column`, sorted; steps: sentences in order; table: the
    training column that holds it; error_bound: how far a value may be off, and whether two executions may differ.

    Raises KeyError for another name."""
    short = feature.removeprefix(f"{group.entity}_")
    trained = f"training.impression_{group.name}.{feature}"
    for derived in group.derived:
        if derived.name == short:
            inputs = sorted(inputs_of([derived]))
            parts = [lineage(group, f"{group.entity}_{name}") for name in inputs]
            return {
                "source_columns": sorted({column for part in parts for column in part["source_columns"]}),
                "steps": [step for part in parts for step in part["steps"]] + [f"{feature} = {derived.expression}"],
                "table": trained,
                "error_bound": _bound_of(parts),
            }
    for measure in group.measures:
        for window in measure.windows:
            if f"{measure.name}_{window.name}" == short:
                return {
                    "source_columns": [f"staging.{group.events}.{column}" for column in _columns(group, measure)],
                    "steps": _steps(group, measure, window.name, feature),
                    "table": trained,
                    "error_bound": _error_bound(measure),
                }
    raise KeyError(feature)


def _error_bound(measure: Measure) -> str:
    if measure.aggregation == "approx_quantile":
        share = f"{100 * (measure.relative_error or 0):g} %"
        return f"approximate: within {share} of the quantile; the same in every execution"
    if measure.aggregation == "approx_count_distinct":
        share = f"{104 / sketches.REGISTERS**0.5:.1f} %"
        return f"approximate: one standard error is {share}; the same in every execution"
    return ROUNDED if measure.type == "double" or measure.aggregation == "avg" else EXACT


def _bound_of(parts: list[dict[str, Any]]) -> str:
    """Of a derived feature: rounding, beside what its inputs are off by."""
    approximate = sorted({part["error_bound"] for part in parts} - {EXACT, ROUNDED})
    return "; its inputs are ".join([ROUNDED, *approximate])


def _columns(group: FeatureGroup, measure: Measure) -> list[str]:
    read = {"event_ts", *group.entity_keys}
    for expression in (measure.where, measure.of, measure.bucket_by):
        if expression:
            read |= {column.name for column in sqlglot.parse_one(expression, dialect="duckdb").find_all(exp.Column)}
    return sorted(read)


def _steps(group: FeatureGroup, measure: Measure, window: str, feature: str) -> list[str]:
    of, where = (f" {word} {text}" if text else "" for word, text in (("of", measure.of), ("where", measure.where)))
    filled = [
        f"{one.name}: {one.column} of {entry.relation} as of event_ts, known when the event landed"
        + (", where the event has none" if one.is_carried else "")
        for entry in group.attributes
        for one in entry.columns
        if one.name in _columns(group, measure)
    ]
    per = f"per ({', '.join(group.keys)}) and 5-minute block of staging.{group.events}"
    tables = ", ".join(f"features.{name}" for name in block_tables(group.name))
    until = "the request" if measure.freshness == "event" else "the tick T"
    return [
        *filled,
        f"{measure.name}: {measure.aggregation}{of}{where}, {per}",
        f"{tables}: the same of 5 minutes, 1 hour, 1 day",
        f"{feature}: combined over {window} before {until}, as known at K",
    ]


def described(groups: Mapping[str, FeatureGroup]) -> list[dict[str, Any]]:
    """Every feature of the groups with its description and lineage: `target/features.json`, beside dbt's manifest."""
    rows = []
    for group in groups.values():
        descriptions = {measure.name: measure.description for measure in group.measures}
        for feature in group.all_names:
            measure = feature.removeprefix(f"{group.entity}_").rpartition("_")[0]
            common = {"feature": feature, "group": group.name, "keys": list(group.keys), "declared_in": group.source}
            rows.append({**common, "description": descriptions.get(measure, ""), **lineage(group, feature)})
    return rows
