"""Attributes of light events: columns that an event need not carry, read from a table of the lake as of the event's time.

`config.meta.attributes` of `stg_engagements`, a list; a later entry may look up by what an earlier one has found:

    - from: lake.note_versions           # a source table or a model; one row per version of a key
      keys: [note_id]                    # or {column of the events: column of the table}
      valid_from: valid_from             # when the version became true
      available_at: loaded_at            # when it could first be read; valid_from where left out or NULL
      columns: [author_id, note_type]    # or {column of the events: column of the table}

The value for an event is that of the newest row of its key with valid_from <= event_ts that was known when the event landed:
arrival_tick(available_at) <= newest_tick(landed_at). So it depends on stored rows alone, is the same for every reader at every
K, and never changes afterwards: a row that comes later is for later events, and what was missing then is NULL. What an event
carries itself wins. `attributes.sql` says this in SQL, `attributes_oracle.py` in Python.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from warehouse.errors import HeadraceError

STAGING_MODEL = "stg_engagements"
CARRIED = ("user_id", "note_id", "author_id", "surface", "request_id", "impression_id")
"""Columns of the log that an event may leave to a table."""
TYPES = ("varchar", "bigint", "integer", "double", "boolean")
_SETTINGS = ("from", "keys", "valid_from", "available_at", "columns")


@dataclass(frozen=True)
class Attribute:
    """One column of the events. type: one of `TYPES`. is_carried: an event may have it itself, and then that counts."""

    name: str
    column: str
    type: str
    is_carried: bool


@dataclass(frozen=True)
class Attributes:
    """What one table adds to events. keys: (column of the events, column of the table)."""

    relation: str
    keys: tuple[tuple[str, str], ...]
    valid_from: str
    available_at: str
    columns: tuple[Attribute, ...]
    source: str
    """Where it is declared: `warehouse/models/staging/_staging.yml:9`."""

    @property
    def table_columns(self) -> tuple[str, ...]:
        """The columns of the table that are read, each once."""
        keys = (column for _, column in self.keys)
        return tuple(dict.fromkeys((*keys, self.valid_from, self.available_at, *(one.column for one in self.columns))))

    def as_meta(self) -> dict[str, Any]:
        """As the macros read it."""
        return {
            "relation": self.relation,
            "keys": [{"name": name, "column": column} for name, column in self.keys],
            "valid_from": self.valid_from,
            "available_at": self.available_at,
            "columns": [
                {"name": one.name, "column": one.column, "type": one.type, "is_carried": one.is_carried} for one in self.columns
            ],
        }


def names_of(attributes: tuple[Attributes, ...]) -> frozenset[str]:
    """The columns of the events that some table fills."""
    return frozenset(one.name for entry in attributes for one in entry.columns)


def read_attributes(
    declared: Any, file: str, line: int, types: Mapping[str, str | None], relations: Mapping[str, frozenset[str]]
) -> tuple[Attributes, ...]:
    """The declaration of the staging model, checked.

    types: the model's columns with their declared `data_type`. relations: `namespace.table` of every source table and model →
    the columns described beside it. Raises HeadraceError naming file, line, rule and remedy.
    """
    if not isinstance(declared, list) or not all(isinstance(entry, dict) for entry in declared):
        raise HeadraceError(f"{file}:{line}: attributes is a list of mappings with {', '.join(_SETTINGS)}; got {declared!r}")
    found: list[Attributes] = []
    for entry in declared:

        def fail(problem: str, at: int = entry["__line__"]) -> HeadraceError:
            return HeadraceError(f"{file}:{at}: attributes: {problem}")

        filled = names_of(tuple(found))
        found.append(_attributes(entry, types, relations, filled, f"{file}:{entry['__line__']}", fail))
    return tuple(found)


def _attributes(
    entry: Mapping[str, Any],
    types: Mapping[str, str | None],
    relations: Mapping[str, frozenset[str]],
    filled: frozenset[str],
    source: str,
    fail: Callable[[str], HeadraceError],
) -> Attributes:
    if unknown := sorted(set(entry) - {*_SETTINGS, "__line__"}):
        raise fail(f"unknown settings {unknown}; allowed are {sorted(_SETTINGS)}")
    for required in ("from", "keys", "valid_from", "columns"):
        if not entry.get(required):
            raise fail(f"{required} is missing; an entry has from, keys, valid_from and columns, and may have available_at")
    relation, valid_from = str(entry["from"]), str(entry["valid_from"])
    if relation not in relations:
        raise fail(f"{relation} is no source table or model of this project; describe it under `sources` first")
    available_at = str(entry.get("available_at") or valid_from)
    keys, columns = (_pairs(name, entry[name], fail) for name in ("keys", "columns"))
    for column in (*(column for _, column in (*keys, *columns)), valid_from, available_at):
        if column not in relations[relation]:
            there = ", ".join(sorted(relations[relation])) or "none"
            raise fail(f"{relation} has no column {column}; the columns described beside it are {there}")
    for name, _ in keys:
        if name not in CARRIED and name not in filled:
            raise fail(
                f"events are looked up by {name}, which they do not have; use {', '.join(CARRIED)} or what is filled before"
            )
    found = []
    for name, column in columns:
        kind = (types.get(name) or "").lower()
        if name in _OWN:
            raise fail(f"{name} is the event's own or made by staging; a table may fill {', '.join(CARRIED)} or a new column")
        if name in filled:
            raise fail(f"{name} is filled twice; an event has one value of it")
        if name not in types:
            raise fail(
                f"{name} is not described among the columns of {STAGING_MODEL}; add {{name: {name}, data_type: …}} there"
            )
        if kind not in TYPES:
            raise fail(
                f"{name} needs a data_type among the columns of {STAGING_MODEL}: {', '.join(TYPES)}; got {kind or 'none'}"
            )
        if name in CARRIED and kind != "varchar":
            raise fail(f"{name} is text in the log; its data_type is varchar, not {kind}")
        if name in (name for name, _ in keys):
            raise fail(f"{name} is looked up by itself")
        found.append(Attribute(name, column, kind, name in CARRIED))
    return Attributes(relation, keys, valid_from, available_at, tuple(found), source)


_OWN = ("event_id", "event_type", "event_ts", "landed_at", "log_partition", "log_offset", "known_at", "watch_ms", "retracts")


def _pairs(setting: str, given: Any, fail: Callable[[str], HeadraceError]) -> tuple[tuple[str, str], ...]:
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        return tuple((name, name) for name in given)
    if isinstance(given, dict):
        return tuple((str(name), str(column)) for name, column in given.items() if name != "__line__")
    raise fail(f"{setting} is a list of columns, or a mapping of the events' columns to the table's; got {given!r}")
