"""Feature declarations: read from dbt properties, checked, and turned into small frozen dataclasses.

A declaration is `config.meta.features` of the block model that it builds. This module knows nothing of SQL text beyond
asking sqlglot whether an expression is one that every execution can evaluate.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sqlglot
import yaml
from sqlglot import expressions as exp

from warehouse.errors import HeadraceError
from warehouse.home import REPOSITORY
from warehouse.time_algebra import Window, parse_window

AGGREGATIONS = ("count", "sum", "avg", "min", "max", "last_n")
INVERTIBLE = ("count", "sum", "avg")
"""Aggregations whose representation can be subtracted: windows are differences of prefix sums (exact for integers)."""
TYPES = ("bigint", "double", "varchar")
FRESHNESS = ("block", "event")
ANCHORS = ("tick", "request")

_ALLOWED: tuple[type[exp.Expr], ...] = (
    exp.Column, exp.Identifier, exp.Literal, exp.Boolean, exp.Null, exp.Paren, exp.And, exp.Or, exp.Not,
    exp.EQ, exp.NEQ, exp.LT, exp.LTE, exp.GT, exp.GTE, exp.Is, exp.In, exp.Between, exp.Tuple,
    exp.Add, exp.Sub, exp.Mul, exp.Div, exp.Neg, exp.Case, exp.If, exp.Coalesce, exp.Nullif, exp.Least, exp.Greatest,
    exp.Abs, exp.Sqrt, exp.Ln, exp.Cast, exp.DataType, exp.DataTypeParam,
)  # fmt: skip
ALLOWED_FUNCTIONS = "+ - * / and or not = <> < <= > >= is in between case coalesce nullif least greatest abs sqrt ln cast"


@dataclass(frozen=True)
class Measure:
    """One aggregation over a group's events; one feature per window."""

    name: str
    aggregation: str
    where: str | None
    of: str | None
    type: str
    n: int | None
    windows: tuple[Window, ...]
    freshness: str
    anchor: str
    description: str

    @property
    def is_sequence(self) -> bool:
        return self.aggregation == "last_n"

    @property
    def is_invertible(self) -> bool:
        return self.aggregation in INVERTIBLE and self.type == "bigint"


@dataclass(frozen=True)
class Derived:
    """SQL over finalized features of the same group, float64; x/0 is NULL."""

    name: str
    expression: str

    @property
    def sql(self) -> str:
        """The expression for DuckDB with its NULL rules written out: x/0, ln(x <= 0) and sqrt(x < 0) are NULL."""
        return _null_safe(sqlglot.parse_one(self.expression, dialect="duckdb")).sql(dialect="duckdb")


def _null_safe(node: exp.Expr) -> exp.Expr:
    for child in list(node.iter_expressions()):
        child.replace(_null_safe(child))
    if isinstance(node, exp.Div):
        return exp.Div(this=node.this, expression=exp.Nullif(this=node.expression, expression=exp.Literal.number(0)))
    if isinstance(node, exp.Ln | exp.Sqrt):
        edge = exp.GT if isinstance(node, exp.Ln) else exp.GTE
        inside = edge(this=exp.Paren(this=node.this.copy()), expression=exp.Literal.number(0))
        return exp.Case(ifs=[exp.If(this=inside, true=node.copy())])
    return node


@dataclass(frozen=True)
class FeatureGroup:
    """What is counted about one entity: the declaration behind one block model per granularity."""

    name: str
    entity: str
    keys: tuple[str, ...]
    events: str
    measures: tuple[Measure, ...]
    derived: tuple[Derived, ...]
    source: str
    """Where it is declared: `warehouse/models/blocks/_blocks.yml:5`."""

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Scalar features: every measure and window in order, then the derived ones."""
        windowed = [
            f"{self.entity}_{measure.name}_{window.name}"
            for measure in self.measures
            if not measure.is_sequence
            for window in measure.windows
        ]
        return (*windowed, *(f"{self.entity}_{derived.name}" for derived in self.derived))

    @property
    def sequence_names(self) -> tuple[str, ...]:
        return tuple(
            f"{self.entity}_{measure.name}_{window.name}"
            for measure in self.measures
            if measure.is_sequence
            for window in measure.windows
        )

    def as_meta(self) -> dict[str, Any]:
        """The declaration as the macros read it from `config.meta.features`."""
        return {
            "entity": self.entity,
            "events": self.events,
            "keys": list(self.keys),
            "measures": [
                {**asdict(measure), "windows": [window.name for window in measure.windows]} for measure in self.measures
            ],
            "derived": [{**asdict(derived), "sql": derived.sql} for derived in self.derived],
        }


def load_groups(project_dir: Path | None = None) -> dict[str, FeatureGroup]:
    """All declared groups by name, in the order of the files. Raises HeadraceError naming file, line, rule and remedy."""
    root = project_dir or REPOSITORY
    files = sorted((root / "warehouse" / "models").rglob("*.yml"))
    models = [model for path in files for model in _models(path, root)]
    columns = {model["name"]: _column_names(model) for model in models}
    groups: dict[str, FeatureGroup] = {}
    for model in models:
        meta = ((model.get("config") or {}).get("meta") or {}).get("features")
        if meta is None or isinstance(meta, list) or "kind" in meta:  # the other kinds: warehouse/features/kinds
            continue
        group = _group(model["name"], meta, columns, f"{model['__file__']}:{meta.get('__line__', model['__line__'])}")
        if group.name in groups:
            raise HeadraceError(f"{group.source}: model {group.name} is declared twice, first in {groups[group.name].source}")
        groups[group.name] = group
    return groups


def declarations_hash(groups: dict[str, FeatureGroup]) -> str:
    """A short hash of what the features mean; prose and places do not count."""
    meaning = [
        {"name": group.name, **{key: value for key, value in _without_prose(group.as_meta()).items()}}
        for group in groups.values()
    ]
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:16]


def _without_prose(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_prose(item) for key, item in value.items() if key != "description"}
    return [_without_prose(item) for item in value] if isinstance(value, list) else value


class LineLoader(yaml.SafeLoader):
    """Keeps the line of every mapping under `__line__`."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        mapping["__line__"] = node.start_mark.line + 1
        return mapping


def _models(path: Path, root: Path) -> Iterator[dict[str, Any]]:
    where = path.relative_to(root)
    try:
        content = yaml.load(path.read_text(), Loader=LineLoader) or {}
    except yaml.YAMLError as error:
        raise HeadraceError(f"{where}: not valid YAML: {error}") from error
    for model in content.get("models") or []:
        yield {**model, "__file__": str(where)}


def _column_names(model: dict[str, Any]) -> frozenset[str]:
    return frozenset(column["name"] for column in model.get("columns") or [])


def _group(name: str, meta: dict[str, Any], columns: dict[str, frozenset[str]], source: str) -> FeatureGroup:
    def fail(problem: str, at: dict[str, Any] | None = None) -> HeadraceError:
        file = source.rpartition(":")[0]
        return HeadraceError(f"{file}:{at['__line__']}: {problem}" if at else f"{source}: {problem}")

    for required in ("entity", "events", "keys", "measures"):
        if not meta.get(required):
            raise fail(f"feature group {name} has no {required}; a group declares entity, events, keys and measures")
    if meta["events"] not in columns:
        raise fail(f"feature group {name} reads {meta['events']}, which is no model of this project")
    event_columns = columns[meta["events"]]
    for key in meta["keys"]:
        if key not in event_columns:
            raise fail(f"key {key} is no column of {meta['events']}; it has {', '.join(sorted(event_columns))}")
    measures = tuple(_measure(entry, meta, event_columns, fail) for entry in meta["measures"])
    windowed = frozenset(
        f"{measure.name}_{window.name}" for measure in measures if not measure.is_sequence for window in measure.windows
    )
    derived = tuple(_derived(entry, windowed, fail) for entry in meta.get("derived") or [])
    names = [measure.name for measure in measures] + [entry.name for entry in derived]
    for repeated in {entry for entry in names if names.count(entry) > 1}:
        raise fail(f"{repeated} is declared twice in feature group {name}")
    return FeatureGroup(name, meta["entity"], tuple(meta["keys"]), meta["events"], measures, derived, source)


def _measure(entry: dict[str, Any], meta: dict[str, Any], columns: frozenset[str], fail: Any) -> Measure:
    known = {"name", "aggregation", "where", "of", "type", "n", "windows", "freshness", "anchor", "description", "__line__"}
    name = entry.get("name")
    if not name:
        raise fail("a measure has no name", entry)
    if unknown := set(entry) - known:
        raise fail(f"measure {name} has unknown settings {sorted(unknown)}; allowed are {sorted(known - {'__line__'})}", entry)
    aggregation = entry.get("aggregation")
    if aggregation not in AGGREGATIONS:
        raise fail(f"measure {name}: aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}", entry)
    if aggregation != "count" and not entry.get("of"):
        raise fail(f"measure {name}: {aggregation} needs `of`, the column or expression it aggregates", entry)
    value_type = entry.get("type") or "bigint"
    if value_type not in TYPES:
        raise fail(f"measure {name}: type must be one of {', '.join(TYPES)}, got {value_type!r}", entry)
    if (value_type == "varchar") != (aggregation == "last_n"):
        raise fail(
            f"measure {name}: last_n takes type varchar, the others bigint or double; got {aggregation} of {value_type}", entry
        )
    n = entry.get("n")
    if (aggregation == "last_n") != (isinstance(n, int) and n > 0):
        raise fail(f"measure {name}: last_n, and only last_n, needs a positive n; got {n!r}", entry)
    if not entry.get("windows"):
        raise fail(f"measure {name} has no windows; write for example windows: [1h, 7d]", entry)
    try:
        windows = tuple(parse_window(window) for window in entry["windows"])
    except ValueError as error:
        raise fail(f"measure {name}: {error}", entry) from None
    freshness = entry.get("freshness") or meta.get("freshness") or "block"
    anchor = entry.get("anchor") or ("request" if freshness == "event" else "tick")
    if freshness not in FRESHNESS or anchor not in ANCHORS or (freshness == "event" and anchor != "request"):
        raise fail(
            f"measure {name}: freshness is block (anchor tick or request) or event (anchor request), got {freshness}, {anchor}",
            entry,
        )
    for setting in ("where", "of"):
        if entry.get(setting):
            check_expression(
                str(entry[setting]),
                columns,
                lambda problem, setting=setting: fail(f"measure {name}: {setting}: {problem}", entry),
            )
    return Measure(
        name,
        aggregation,
        entry.get("where"),
        entry.get("of"),
        value_type,
        n,
        windows,
        freshness,
        anchor,
        entry.get("description") or "",
    )


def _derived(entry: dict[str, Any], columns: frozenset[str], fail: Any) -> Derived:
    if not entry.get("name") or not entry.get("expression"):
        raise fail("a derived feature needs a name and an expression", entry)
    check_expression(entry["expression"], columns, lambda problem: fail(f"derived {entry['name']}: {problem}", entry))
    return Derived(entry["name"], entry["expression"])


def check_expression(text: str, columns: frozenset[str], fail: Any) -> exp.Expr:
    """Parses an expression in DuckDB's dialect and refuses what some execution could not evaluate alike."""
    try:
        tree = sqlglot.parse_one(text, dialect="duckdb")
    except sqlglot.errors.ParseError as error:
        raise fail(f"cannot be parsed: {str(error).splitlines()[0]}") from None
    for node in tree.walk():
        if not isinstance(node, _ALLOWED):
            raise fail(f"{node.sql(dialect='duckdb')} is not allowed; use {ALLOWED_FUNCTIONS}")
        if isinstance(node, exp.Column) and node.name not in columns:
            raise fail(f"no column {node.name}; there are {', '.join(sorted(columns))}")
    return tree
