"""Feature declarations: read from dbt properties, checked, and turned into small frozen dataclasses.

A declaration is `config.meta.features` of the block model that it builds. This module knows nothing of SQL text beyond
asking sqlglot whether an expression is one that every execution can evaluate.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import sqlglot
import yaml
from sqlglot import expressions as exp

from warehouse.errors import HeadraceError
from warehouse.features.attributes import STAGING_MODEL, Attributes, read_attributes
from warehouse.features.expression_types import check_division, check_integers, check_text, column_type
from warehouse.features.measures import AGGREGATIONS, BUCKETED, CALENDAR_PARTS, CalendarKey, Measure
from warehouse.home import REPOSITORY
from warehouse.time_algebra import Window, parse_window, session_window

try:
    from yaml import CSafeLoader as _SafeLoader  # eight times as fast
except ImportError:  # PyYAML built without libyaml
    from yaml import SafeLoader as _SafeLoader

FRESHNESS = ("block", "event")
ANCHORS = ("tick", "request")
Columns = Mapping[str, str | None]
"""Columns of a model with their types (`expression_types`), None where undeclared."""

_ALLOWED: tuple[type[exp.Expr], ...] = (
    exp.Column, exp.Identifier, exp.Literal, exp.Boolean, exp.Null, exp.Paren, exp.And, exp.Or, exp.Not,
    exp.EQ, exp.NEQ, exp.LT, exp.LTE, exp.GT, exp.GTE, exp.Is, exp.In, exp.Between, exp.Tuple,
    exp.Add, exp.Sub, exp.Mul, exp.Div, exp.Neg, exp.Case, exp.If, exp.Coalesce, exp.Nullif, exp.Least, exp.Greatest,
    exp.Abs, exp.Sqrt, exp.Ln, exp.Cast, exp.DataType, exp.DataTypeParam,
)  # fmt: skip
ALLOWED_FUNCTIONS = "+ - * / and or not = <> < <= > >= is in between case coalesce nullif least greatest abs sqrt ln cast"


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
    """Key columns of its blocks: the entity's, then the calendar ones."""
    events: str
    measures: tuple[Measure, ...]
    derived: tuple[Derived, ...]
    source: str
    """Where it is declared: `warehouse/models/blocks/_blocks.yml:5`."""
    calendar: tuple[CalendarKey, ...] = ()
    attributes: tuple[Attributes, ...] = ()
    """What tables of the lake add to its events."""

    @cached_property
    def entity_keys(self) -> tuple[str, ...]:
        """The key columns that a reader gives; calendar keys are parts of its t."""
        return self.keys[: len(self.keys) - len(self.calendar)]

    def block_key(self, key: Sequence[str | None], request_us: int) -> tuple[str | None, ...]:
        """The key of the blocks that a reader with this entity key reads at t."""
        return (*key, *(part.of(request_us) for part in self.calendar))

    @cached_property
    def feature_names(self) -> tuple[str, ...]:
        """Features that are numbers: every measure and window in order, then the derived ones."""
        return (*self._names("number"), *(f"{self.entity}_{derived.name}" for derived in self.derived))

    @cached_property
    def sequence_names(self) -> tuple[str, ...]:
        """Features that are lists of text."""
        return self._names("list")

    @cached_property
    def map_names(self) -> tuple[str, ...]:
        """Features that are maps of text to numbers."""
        return self._names("map")

    @cached_property
    def all_names(self) -> tuple[str, ...]:
        """Numbers, lists and maps."""
        return (*self.feature_names, *self.sequence_names, *self.map_names)

    def _names(self, shape: str) -> tuple[str, ...]:
        return tuple(
            f"{self.entity}_{measure.name}_{window.name}"
            for measure in self.measures
            if measure.shape == shape
            for window in measure.windows
        )

    def as_meta(self) -> dict[str, Any]:
        """The declaration as the macros read it from `config.meta.features`."""
        return {
            "entity": self.entity,
            "events": self.events,
            "keys": list(self.keys),
            "calendar": [{**asdict(part), "field": CALENDAR_PARTS[part.part]} for part in self.calendar],
            "measures": [
                {
                    **asdict(measure),
                    "windows": [window.name for window in measure.windows],
                    "representation": measure.representation,
                    "shape": measure.shape,
                    "columns": list(measure.columns),
                }
                for measure in self.measures
            ],
            "derived": [{**asdict(derived), "sql": derived.sql} for derived in self.derived],
            **({"attributes": [entry.as_meta() for entry in self.attributes]} if self.attributes else {}),
        }


def load_groups(project_dir: Path | None = None) -> dict[str, FeatureGroup]:
    """All declared groups by name, in the order of the files. Raises HeadraceError naming file, line, rule and remedy."""
    root = project_dir or REPOSITORY
    models, relations = _models(root)
    columns = {model["name"]: _columns(model) for model in models}
    attributes = _attributes(models, columns, relations)
    groups: dict[str, FeatureGroup] = {}
    for model in models:
        meta = ((model.get("config") or {}).get("meta") or {}).get("features")
        if meta is None or isinstance(meta, list) or "kind" in meta:  # the other kinds: warehouse/features/kinds
            continue
        source = f"{model['__file__']}:{meta.get('__line__', model['__line__'])}"
        group = _group(model["name"], meta, columns, source, attributes)
        if group.name in groups:
            raise HeadraceError(f"{group.source}: model {group.name} is declared twice, first in {groups[group.name].source}")
        groups[group.name] = group
    return groups


def load_attributes(project_dir: Path | None = None) -> tuple[Attributes, ...]:
    """What tables of the lake add to the events of the staging model. Raises HeadraceError as `load_groups` does."""
    models, relations = _models(project_dir or REPOSITORY)
    return _attributes(models, {model["name"]: _columns(model) for model in models}, relations)


def _attributes(
    models: Sequence[Mapping[str, Any]], columns: Mapping[str, Columns], relations: Mapping[str, frozenset[str]]
) -> tuple[Attributes, ...]:
    found: tuple[Attributes, ...] = ()
    for model in models:
        declared = ((model.get("config") or {}).get("meta") or {}).get("attributes")
        if declared is None:
            continue
        line = model["__line__"]
        if model["name"] != STAGING_MODEL:
            raise HeadraceError(
                f"{model['__file__']}:{line}: attributes belong to {STAGING_MODEL}, which stages events, not to {model['name']}"
            )
        types = {column["name"]: column.get("data_type") for column in model.get("columns") or []}
        found = read_attributes(declared, model["__file__"], line, types, relations)
    return found


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


class LineLoader(_SafeLoader):
    """Keeps the line of every mapping under `__line__`."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        mapping["__line__"] = node.start_mark.line + 1
        return mapping


def _models(root: Path) -> tuple[list[dict[str, Any]], dict[str, frozenset[str]]]:
    """Every described model, and of every table of the lake that is described, source or model, the columns beside it."""
    models: list[dict[str, Any]] = []
    relations: dict[str, frozenset[str]] = {}
    for path in sorted((root / "warehouse" / "models").rglob("*.yml")):
        where = path.relative_to(root)
        try:
            content = yaml.load(path.read_text(), Loader=LineLoader) or {}
        except yaml.YAMLError as error:
            raise HeadraceError(f"{where}: not valid YAML: {error}") from error
        for model in content.get("models") or []:
            models.append({**model, "__file__": str(where)})
            schema = (model.get("config") or {}).get("schema") or path.parent.name
            relations[f"{ {'blocks': 'features'}.get(schema, schema) }.{model['name']}"] = _names(model)
        for source in content.get("sources") or []:
            for table in source.get("tables") or []:
                relations[f"{source.get('schema') or source['name']}.{table['name']}"] = _names(table)
    return models, relations


def _names(node: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(column["name"] for column in node.get("columns") or [])


def _columns(model: dict[str, Any]) -> Columns:
    return {column["name"]: column_type(column.get("data_type")) for column in model.get("columns") or []}


def _group(
    name: str, meta: dict[str, Any], columns: dict[str, Columns], source: str, attributes: tuple[Attributes, ...]
) -> FeatureGroup:
    def fail(problem: str, at: dict[str, Any] | None = None) -> HeadraceError:
        file = source.rpartition(":")[0]
        return HeadraceError(f"{file}:{at['__line__']}: {problem}" if at else f"{source}: {problem}")

    for required in ("entity", "events", "keys", "measures"):
        if not meta.get(required):
            raise fail(f"feature group {name} has no {required}; a group declares entity, events, keys and measures")
    if meta["events"] not in columns:
        raise fail(f"feature group {name} reads {meta['events']}, which is no model of this project")
    event_columns = columns[meta["events"]]
    keys = tuple(key for key in meta["keys"] if not isinstance(key, dict))
    calendar = tuple(_calendar_key(key, event_columns, fail) for key in meta["keys"] if isinstance(key, dict))
    for key in keys:
        if key not in event_columns:
            raise fail(f"key {key} is no column of {meta['events']}; it has {', '.join(sorted(event_columns))}")
    if not keys:
        raise fail(f"feature group {name} has calendar keys only; give a column of {meta['events']} as well")
    measures = tuple(_measure(entry, meta, event_columns, fail) for entry in meta["measures"])
    windowed = frozenset(
        f"{measure.name}_{window.name}" for measure in measures if measure.shape == "number" for window in measure.windows
    )
    derived = tuple(_derived(entry, windowed, fail) for entry in meta.get("derived") or [])
    names = [measure.name for measure in measures] + [entry.name for entry in derived]
    for repeated in {entry for entry in names if names.count(entry) > 1}:
        raise fail(f"{repeated} is declared twice in feature group {name}")
    keys = (*keys, *(part.name for part in calendar))
    filled = attributes if meta["events"] == STAGING_MODEL else ()
    return FeatureGroup(name, meta["entity"], keys, meta["events"], measures, derived, source, calendar, filled)


def _calendar_key(entry: dict[str, Any], columns: Columns, fail: Any) -> CalendarKey:
    name, part, zone = entry.get("name"), entry.get("part"), entry.get("zone")
    if set(entry) - {"name", "part", "zone", "__line__"} or not name or not zone:
        raise fail("a calendar key is {name: hour_of_day, part: hour, zone: Asia/Shanghai}", entry)
    if name in columns:
        raise fail(f"calendar key {name} has the name of a column of the events; give it another", entry)
    if part not in CALENDAR_PARTS:
        raise fail(f"calendar key {name}: part must be one of {', '.join(CALENDAR_PARTS)}, got {part!r}", entry)
    try:
        ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError):
        raise fail(f"calendar key {name}: no time zone {zone!r}; write for example UTC or Asia/Shanghai", entry) from None
    return CalendarKey(name, part, zone)


_SETTINGS = (
    "name", "aggregation", "where", "of", "type", "n", "k", "q", "relative_error", "bucket_by", "empty", "windows", "freshness",
    "anchor", "description",
)  # fmt: skip
_RELATIVE_ERROR = 0.01


def _measure(entry: dict[str, Any], meta: dict[str, Any], columns: Columns, fail: Any) -> Measure:
    name = entry.get("name")
    if not name:
        raise fail("a measure has no name", entry)
    if unknown := set(entry) - {*_SETTINGS, "__line__"}:
        raise fail(f"measure {name} has unknown settings {sorted(unknown)}; allowed are {sorted(_SETTINGS)}", entry)
    aggregation = entry.get("aggregation")
    if aggregation not in AGGREGATIONS:
        raise fail(f"measure {name}: aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}", entry)
    if aggregation != "count" and not entry.get("of"):
        raise fail(f"measure {name}: {aggregation} needs `of`, the column or expression it aggregates", entry)
    types = AGGREGATIONS[aggregation].types
    value_type = entry.get("type") or types[0]
    if value_type not in types:
        raise fail(f"measure {name}: {aggregation} takes type {' or '.join(types)}, got {value_type!r}", entry)
    numbers = _numbers(name, aggregation, entry, fail)
    if entry.get("bucket_by") and aggregation not in BUCKETED:
        raise fail(f"measure {name}: bucket_by goes with {', '.join(BUCKETED)}, not with {aggregation}", entry)
    empty = entry.get("empty")
    if empty is not None and (
        isinstance(empty, bool)
        or not isinstance(empty, int | float)
        or AGGREGATIONS[aggregation].shape != "number"
        or aggregation in ("count", "sum", "approx_count_distinct")
        or entry.get("bucket_by")
    ):
        raise fail(
            f"measure {name}: empty is a number in place of NULL, and {aggregation} "
            + ("of buckets " if entry.get("bucket_by") else "")
            + ("is never NULL" if aggregation in ("count", "sum", "approx_count_distinct") else f"cannot take {empty!r}"),
            entry,
        )
    if not entry.get("windows"):
        raise fail(f"measure {name} has no windows; write for example windows: [1h, 7d]", entry)
    try:
        windows = tuple(_window(window) for window in entry["windows"])
    except ValueError as error:
        raise fail(f"measure {name}: {error}", entry) from None
    freshness = entry.get("freshness") or meta.get("freshness") or "block"
    anchor = entry.get("anchor") or ("request" if freshness == "event" else "tick")
    if freshness not in FRESHNESS or anchor not in ANCHORS or (freshness == "event" and anchor != "request"):
        raise fail(
            f"measure {name}: freshness is block (anchor tick or request) or event (anchor request), got {freshness}, {anchor}",
            entry,
        )
    for setting in ("where", "of", "bucket_by"):
        if entry.get(setting):

            def refuse(problem: str, setting: str = setting) -> HeadraceError:
                return fail(f"measure {name}: {setting}: {problem}", entry)

            tree = check_expression(str(entry[setting]), columns, refuse)
            check_division(tree, columns, refuse)
            is_read_as_text = setting == "bucket_by" or (setting == "of" and value_type == "varchar")
            check_text(tree, is_read_as_text, columns, refuse)
            if setting == "of" and value_type == "bigint" and aggregation != "count":
                check_integers(tree, columns, refuse)
    return Measure(
        name,
        aggregation,
        entry.get("where"),
        entry.get("of"),
        value_type,
        *numbers,
        entry.get("bucket_by"),
        None if empty is None else float(empty),
        windows,
        freshness,
        anchor,
        entry.get("description") or "",
    )


def _numbers(
    name: str, aggregation: str, entry: dict[str, Any], fail: Any
) -> tuple[int | None, int | None, float | None, float | None]:
    """n, k, q and relative_error."""
    needed = AGGREGATIONS[aggregation].setting
    for setting in ("n", "k", "q"):
        given = entry.get(setting)
        if setting != needed:
            if given is not None:
                owners = ", ".join(known for known, of in AGGREGATIONS.items() if of.setting == setting)
                raise fail(f"measure {name}: {setting} is a setting of {owners}, not of {aggregation}", entry)
        elif setting == "q":
            if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1:
                raise fail(f"measure {name}: {aggregation} needs q, from 0 to 1; got {given!r}", entry)
        elif isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise fail(f"measure {name}: {aggregation} needs a positive {setting}; got {given!r}", entry)
    error = entry.get("relative_error")
    if error is not None and (needed != "q" or not isinstance(error, float) or not 0.001 <= error <= 0.1):
        raise fail(f"measure {name}: relative_error, of approx_quantile only, is from 0.001 to 0.1; got {error!r}", entry)
    n = 1 if aggregation in ("first", "last") else entry.get("n")
    q = None if needed != "q" else float(entry["q"])
    return n, entry.get("k"), q, (error or _RELATIVE_ERROR) if needed == "q" else None


def _window(entry: Any) -> Window:
    if not isinstance(entry, dict):
        return parse_window(entry)
    if entry.get("kind") != "session" or set(entry) - {"kind", "gap", "__line__"}:
        raise ValueError("a window is a length such as 6h, lifetime, or {kind: session, gap: 30m}")
    return session_window(str(entry.get("gap")))


def _derived(entry: dict[str, Any], columns: frozenset[str], fail: Any) -> Derived:
    if not entry.get("name") or not entry.get("expression"):
        raise fail("a derived feature needs a name and an expression", entry)
    check_expression(entry["expression"], columns, lambda problem: fail(f"derived {entry['name']}: {problem}", entry))
    return Derived(entry["name"], entry["expression"])


def check_expression(text: str, columns: Collection[str], fail: Any) -> exp.Expr:
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
