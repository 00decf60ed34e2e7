"""Reads the other kinds of features from dbt properties: `config.meta.features` with a `kind`, of a source table or a model.

    kind: request   what the caller says about the request itself; on the source table `lake.forward_log`, where it is logged
    kind: http      what another service answers at request time; beside it, for the same reason
    kind: table     the last row of a batch table with an event time of its own; on that table or model

One property holds one declaration or a list of them. What is wrong is refused with file, line, rule and remedy.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Formatter
from typing import Any
from urllib.parse import urlsplit

import yaml

from warehouse.errors import HeadraceError
from warehouse.features.declarations import LineLoader, load_groups
from warehouse.features.kinds.values import Typed, typed
from warehouse.home import REPOSITORY

REQUEST, HTTP, TABLE = KINDS = ("request", "http", "table")
URL_KEYS = ("user_id", "surface")
"""What a URL may name besides features of the request."""
LONGEST_TIMEOUT_MS = 5_000
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_PATH = re.compile(r"[A-Za-z0-9_-]+(\[\d+\])?(\.[A-Za-z0-9_-]+(\[\d+\])?)*")

_Fail = Callable[[str, Mapping[str, Any]], HeadraceError]


@dataclass(frozen=True)
class RequestFeature:
    """A feature of the request: logged when served, never recomputed. context_key: its name in `context` of a request."""

    value: Typed
    context_key: str
    source: str


@dataclass(frozen=True)
class HttpFeature:
    """A feature that another service answers: one call per request. url: a template whose host is fixed. path: into the JSON,
    such as `score.value` or `results[0].score`. The empty value of `value` stands for a call that failed."""

    value: Typed
    url: str
    path: str
    timeout_ms: int
    source: str

    @property
    def is_default(self) -> str:
        """Name of the 0/1 beside the value: whether it is the default because the call failed."""
        return f"{self.value.name}_is_default"

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*self.value.inputs, self.is_default)


@dataclass(frozen=True)
class TableFeatures:
    """Features that are columns of a batch table: of a key's rows with event_time < t that are known at K, the last one.

    relation: `namespace.table`. order: columns that decide, after event_time and available_at, which of a key's rows is the
    last: the declared tie, then every declared column, so that no two executions differ.
    """

    name: str
    entity: str
    keys: tuple[str, ...]
    relation: str
    event_time: str
    available_at: str
    order: tuple[str, ...]
    columns: tuple[tuple[str, Typed], ...]
    source: str

    @property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(value.name for _, value in self.columns)

    @property
    def sequence_names(self) -> tuple[str, ...]:
        return ()

    @property
    def map_names(self) -> tuple[str, ...]:
        return ()

    @property
    def all_names(self) -> tuple[str, ...]:
        return self.feature_names

    @property
    def entity_keys(self) -> tuple[str, ...]:
        return self.keys

    def as_meta(self) -> dict[str, Any]:
        """As the macro `table_features_at` reads it."""
        return {
            "keys": list(self.keys),
            "event_time": self.event_time,
            "available_at": self.available_at,
            "order": list(self.order),
            "columns": [{"column": column, "name": v.name, "type": v.type, "empty": v.empty} for column, v in self.columns],
        }


@dataclass(frozen=True)
class Kinds:
    """All declared features of the other kinds."""

    request: tuple[RequestFeature, ...] = ()
    http: tuple[HttpFeature, ...] = ()
    tables: tuple[TableFeatures, ...] = ()

    @property
    def served_inputs(self) -> tuple[str, ...]:
        """Numbers that come with a request and are known afterwards from the forward log alone."""
        return (
            *(name for feature in self.request for name in feature.value.inputs),
            *(name for feature in self.http for name in feature.inputs),
        )

    def why_not(self, name: str) -> str | None:
        """Why a feature of this name cannot be computed again, or None if it is none of these."""
        of_request = {name: "a feature of the request itself" for f in self.request for name in (f.value.name, *f.value.inputs)}
        of_http = {name: "fetched when a request is served" for f in self.http for name in f.inputs}
        what = (of_request | of_http).get(name)
        return what and (
            f"{name} is {what}: it is known only from the forward log and cannot be recomputed; "
            "`headrace export-training` takes it from there"
        )


def load_kinds(project_dir: Path | None = None) -> Kinds:
    """Every declaration of the other kinds, in the order of the files. Raises HeadraceError naming file, line, rule, remedy."""
    root = project_dir or REPOSITORY
    taken = {
        name: group.source
        for group in load_groups(project_dir).values()
        for name in (*group.feature_names, *group.sequence_names)
    }
    request: list[RequestFeature] = []
    http: list[HttpFeature] = []
    tables: list[TableFeatures] = []
    later = []
    for place in _places(root):
        for meta in place.declarations:
            kind = meta.get("kind")
            if kind == REQUEST:
                request += _request_features(meta, place.fail)
            elif kind == HTTP:
                later.append((meta, place.fail))  # a URL may name features of the request, declared anywhere
            elif kind == TABLE:
                tables.append(_table_features(meta, place))
            else:
                raise place.fail(f"kind must be one of {', '.join(KINDS)}, got {kind!r}", meta)
    for meta, fail in later:
        http += _http_features(meta, {feature.context_key for feature in request}, fail)
    named = [(feature.value.name, feature.source) for feature in request]
    named += [(feature.value.name, feature.source) for feature in http]
    named += [(name, table.source) for table in tables for name in table.feature_names]
    for name, source in named:
        if name in taken:
            raise HeadraceError(f"{source}: {name} is declared twice, first in {taken[name]}")
        taken[name] = source
    return Kinds(tuple(request), tuple(http), tuple(tables))


@dataclass(frozen=True)
class _Place:
    """One model or source table that declares features of another kind."""

    file: str
    relation: str
    columns: frozenset[str]
    declarations: tuple[dict[str, Any], ...]

    def fail(self, problem: str, at: Mapping[str, Any]) -> HeadraceError:
        return HeadraceError(f"{self.file}:{at['__line__']}: {problem}")


def _places(root: Path) -> Iterator[_Place]:
    for path in sorted((root / "warehouse" / "models").rglob("*.yml")):
        file = str(path.relative_to(root))
        try:
            content = yaml.load(path.read_text(), Loader=LineLoader) or {}
        except yaml.YAMLError as error:
            raise HeadraceError(f"{file}: not valid YAML: {error}") from error
        for source in content.get("sources") or []:
            for table in source.get("tables") or []:
                yield from _place(file, table, f"{source.get('schema') or source['name']}.{table['name']}")
        for model in content.get("models") or []:
            schema = (model.get("config") or {}).get("schema") or path.parent.name
            yield from _place(file, model, f"{ {'blocks': 'features'}.get(schema, schema) }.{model['name']}")


def _place(file: str, node: dict[str, Any], relation: str) -> Iterator[_Place]:
    declared = ((node.get("config") or {}).get("meta") or {}).get("features")
    found = declared if isinstance(declared, list) else [declared] if declared and "kind" in declared else []
    if found:
        columns = frozenset(column["name"] for column in node.get("columns") or [])
        yield _Place(file, relation, columns, tuple(found))


def _request_features(meta: dict[str, Any], fail: _Fail) -> Iterator[RequestFeature]:
    _only(meta, {"kind", "features"}, "a declaration of kind request", fail)
    for entry in _entries(meta, "features", fail):
        _only(entry, {"name", "type", "empty", "allowed", "description"}, f"feature {entry.get('name')}", fail)
        name = _name(entry, fail)
        if name == "surface":
            raise fail("surface is known of every request already; models read it as it is", entry)
        yield RequestFeature(_typed(f"request_{name}", entry, fail), name, _at(fail, entry))


def _http_features(meta: dict[str, Any], context_keys: set[str], fail: _Fail) -> Iterator[HttpFeature]:
    _only(meta, {"kind", "entity", "features"}, "a declaration of kind http", fail)
    entity = meta.get("entity", "request")
    if entity not in ("request", "user"):
        raise fail(f"kind http is fetched once per request: entity must be request or user, got {entity!r}", meta)
    for entry in _entries(meta, "features", fail):
        known = {"name", "type", "url", "path", "timeout_ms", "default", "description"}
        _only(entry, known, f"feature {entry.get('name')}", fail)
        name = f"{entity}_{_name(entry, fail)}"
        if entry.get("type") == "varchar":
            raise fail(f"{name}: kind http takes bigint, double or boolean", entry)
        value = _typed(name, {**entry, "empty": entry.get("default")}, fail)
        timeout_ms = entry.get("timeout_ms")
        if not isinstance(timeout_ms, int) or not 0 < timeout_ms <= LONGEST_TIMEOUT_MS:
            raise fail(f"{name}: timeout_ms must be a whole number from 1 to {LONGEST_TIMEOUT_MS}, got {timeout_ms!r}", entry)
        if not _PATH.fullmatch(str(entry.get("path") or "")):
            raise fail(
                f"{name}: path must lead into the JSON, such as score or results[0].score, got {entry.get('path')!r}", entry
            )
        _check_url(name, str(entry.get("url") or ""), {*URL_KEYS, *context_keys}, partial(_failed_at, fail, entry))
        yield HttpFeature(value, entry["url"], entry["path"], timeout_ms, _at(fail, entry))


def _check_url(name: str, url: str, known: set[str], fail: Callable[[str], HeadraceError]) -> None:
    try:
        fields = [field for _, field, _, _ in Formatter().parse(url) if field is not None]
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise fail(f"{name}: url {url!r} cannot be read: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise fail(f"{name}: url must start with http:// or https:// and a host, got {url!r}")
    if "{" in parts.netloc or "@" in parts.netloc:
        raise fail(
            f"{name}: the host of a url is fixed and carries no password: only its path and query name keys; got {url!r}"
        )
    if unknown := [field for field in fields if field not in known]:
        raise fail(f"{name}: url names {', '.join(unknown)}; it may name {', '.join(sorted(known))}")


def _table_features(meta: dict[str, Any], place: _Place) -> TableFeatures:
    fail = place.fail
    _only(meta, {"kind", "name", "entity", "keys", "event_time", "available_at", "tie", "columns"}, "kind table", fail)
    for required in ("entity", "keys", "event_time", "columns"):
        if not meta.get(required):
            raise fail(f"kind table needs {required}; a table declares entity, keys, event_time and columns", meta)
    available_at, tie = meta.get("available_at") or meta["event_time"], meta.get("tie") or []
    columns = []
    for entry in _entries(meta, "columns", fail):
        _only(entry, {"name", "type", "empty", "description"}, f"column {entry.get('name')}", fail)
        column = _name(entry, fail)
        if entry.get("type") == "varchar":
            raise fail(f"column {column}: kind table takes bigint, double or boolean", entry)
        columns.append((column, _typed(f"{meta['entity']}_{column}", entry, fail)))
    for column in (*meta["keys"], meta["event_time"], available_at, *tie, *(name for name, _ in columns)):
        if column not in place.columns:
            there = ", ".join(sorted(place.columns)) or "none"
            raise fail(f"{place.relation} has no column {column}; the columns described beside it are {there}", meta)
    name = meta.get("name") or place.relation.rpartition(".")[2]
    return TableFeatures(
        name,
        meta["entity"],
        tuple(meta["keys"]),
        place.relation,
        meta["event_time"],
        available_at,
        (*tie, *(column for column, _ in columns)),
        tuple(columns),
        _at(fail, meta),
    )


def _entries(meta: dict[str, Any], key: str, fail: _Fail) -> list[dict[str, Any]]:
    entries = meta.get(key)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise fail(f"kind {meta['kind']} needs {key}, a list of mappings with a name and a type", meta)
    return entries


def _name(entry: dict[str, Any], fail: _Fail) -> str:
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise fail(f"a name is lower case letters, digits and underscores, such as device; got {name!r}", entry)
    return name


def _typed(name: str, entry: Mapping[str, Any], fail: _Fail) -> Typed:
    try:
        return typed(name, entry)
    except HeadraceError as error:
        raise fail(str(error), entry) from None


def _only(entry: dict[str, Any], known: set[str], what: str, fail: _Fail) -> None:
    if unknown := sorted(set(entry) - known - {"__line__"}):
        raise fail(f"{what} has unknown settings {unknown}; allowed are {sorted(known)}", entry)


def _failed_at(fail: _Fail, entry: Mapping[str, Any], problem: str) -> HeadraceError:
    return fail(problem, entry)


def _at(fail: _Fail, entry: Mapping[str, Any]) -> str:
    """The place of an entry, as an error there would name it."""
    return str(fail("", entry)).removesuffix(": ")
