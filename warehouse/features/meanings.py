"""What each feature means, as one short hash per name: all that it is made of counts, prose, places and defaults do not.

A table keeps the hashes of the features that it was built with, in the same commit as the rows, so that a build (and a plan)
can tell a feature that is new from one that kept its name and changed its meaning.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from warehouse.features.compute_plan import inputs_of
from warehouse.features.declarations import FeatureGroup
from warehouse.features.measures import Measure

_PROSE = ("description", "windows")
_OF_READERS = ("freshness", "anchor", "empty", "k", "q")
"""Settings that change what is read of a block, not what is stored."""


def measure_meanings(group: FeatureGroup) -> dict[str, str]:
    """Of every measure, the columns of the group's block tables: what one event adds to which key."""
    return {measure.name: _hash(_block_meaning(group, measure)) for measure in group.measures}


def feature_meanings(group: FeatureGroup) -> dict[str, str]:
    """Of every scalar feature and sequence of the group. A derived feature means its expression and what its inputs mean."""
    plain = {
        f"{measure.name}_{window.name}": _hash([_meaning(group, measure), window.length_us])
        for measure in group.measures
        for window in measure.windows
    }
    meanings = {f"{group.entity}_{name}": meaning for name, meaning in plain.items()}
    for derived in group.derived:
        inputs = {name: plain.get(name) for name in sorted(inputs_of([derived]))}
        meanings[f"{group.entity}_{derived.name}"] = _hash([derived.expression, inputs])
    return meanings


def table_meanings(table: str, columns: list[str], groups: Mapping[str, FeatureGroup]) -> dict[str, str]:
    """Of the features that a table holds: the measures of a block table (of any granularity), the features of any other.

    table: `namespace.table`; columns: its column names.
    """
    name = table.rpartition(".")[2]
    for group in groups.values():
        if name in block_tables(group.name):
            return measure_meanings(group)
    known = {feature: meaning for group in groups.values() for feature, meaning in feature_meanings(group).items()}
    return {column: known[column] for column in columns if column in known}


def block_tables(group: str) -> tuple[str, str, str]:
    """Names of a group's block tables, fine to coarse."""
    return group, f"{group}_1h", f"{group}_1d"


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Names on both sides whose meaning differs, in the order of `after`."""
    return [name for name, meaning in after.items() if name in before and before[name] != meaning]


def _block_meaning(group: FeatureGroup, measure: Measure) -> list[Any]:
    events, keys, settings, *calendar = _meaning(group, measure)
    return [events, keys, {name: value for name, value in settings.items() if name not in _OF_READERS}, *calendar]


def _meaning(group: FeatureGroup, measure: Measure) -> list[Any]:
    settings = {name: value for name, value in asdict(measure).items() if value is not None and name not in _PROSE}
    filled = [entry.as_meta() for entry in group.attributes]
    return [group.events, group.keys, settings, *(asdict(part) for part in group.calendar), *([filled] if filled else [])]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
