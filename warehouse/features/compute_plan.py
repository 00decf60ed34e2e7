"""What a computation needs: from the names of features to the measures and windows that they are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import sqlglot
from sqlglot import expressions as exp

from warehouse.errors import HeadraceError
from warehouse.features.declarations import Derived, FeatureGroup
from warehouse.features.kinds.declared import Kinds, TableFeatures
from warehouse.features.measures import Measure

_ARROW_TYPES = {"bigint": pa.int64(), "double": pa.float64()}
_FRACTIONS = ("avg", "var", "stddev", "approx_quantile")
TABLE_TYPES = {"bigint": pa.int64(), "double": pa.float64(), "boolean": pa.bool_()}


@dataclass(frozen=True)
class Plan:
    """What to compute: per group, its declaration cut down to what is asked for; and the output columns in order."""

    groups: tuple[FeatureGroup, ...]
    features: tuple[str, ...]
    left_out: tuple[str, ...]
    """Names of groups that were not asked for by name and whose keys the spine lacks."""
    tables: tuple[TableFeatures, ...] = ()
    """Batch tables that some of the features are columns of."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Key columns that the spine must have."""
        sources: list[FeatureGroup | TableFeatures] = [*self.groups, *self.tables]
        return tuple(dict.fromkeys(key for source in sources for key in source.entity_keys))

    def without_tables(self) -> "Plan":
        """The part that is made of events."""
        of_tables = {name for table in self.tables for name in table.feature_names}
        return replace(self, features=tuple(name for name in self.features if name not in of_tables), tables=())

    def types(self) -> dict[str, pa.DataType]:
        """The Arrow type of every output column."""
        known: dict[str, pa.DataType] = {}
        for group in self.groups:
            for measure in group.measures:
                of = type_of(measure)
                known |= {f"{group.entity}_{measure.name}_{window.name}": of for window in measure.windows}
            known |= {f"{group.entity}_{derived.name}": pa.float64() for derived in group.derived}
        for table in self.tables:
            known |= {value.name: TABLE_TYPES[value.type] for _, value in table.columns}
        return {name: known[name] for name in self.features}


def type_of(measure: Measure) -> pa.DataType:
    """The Arrow type of a measure's features."""
    if measure.shape == "list":
        return pa.list_(pa.string())
    number = pa.float64() if measure.aggregation in _FRACTIONS else _ARROW_TYPES.get(measure.type, pa.int64())
    if measure.empty is not None and not measure.empty.is_integer():
        number = pa.float64()
    return pa.map_(pa.string(), number) if measure.shape == "map" else number


def plan(
    groups: Mapping[str, FeatureGroup], columns: Sequence[str], features: Sequence[str] | None, kinds: Kinds | None = None
) -> Plan:
    """Which groups, measures and batch tables give the features; without names, every feature whose keys are among the columns.

    kinds: what may be asked for besides; what only the forward log knows cannot be. Raises HeadraceError for a name that is no
    feature, a name given twice, and columns that hold no group's keys.
    """
    kinds = kinds or Kinds()
    everything: list[FeatureGroup | TableFeatures] = [*groups.values(), *kinds.tables]
    owner = {name: group for group in everything for name in group.all_names}
    if features is None:
        chosen = [group for group in everything if set(group.entity_keys) <= set(columns)]
        if not chosen:
            keys = "; ".join(f"{group.name}: {', '.join(group.entity_keys)}" for group in everything)
            raise HeadraceError(f"the spine holds no group's keys ({keys}); it has {', '.join(columns)}")
        wanted = tuple(name for group in chosen for name in group.all_names)
        left_out = tuple(group.name for group in everything if group not in chosen)
    else:
        wanted, left_out = tuple(features), ()
        if unknown := [name for name in wanted if name not in owner]:
            if why := kinds.why_not(unknown[0]):
                raise HeadraceError(why)
            raise HeadraceError(f"no feature {', '.join(map(repr, unknown))}; see `headrace features list`")
        if not wanted:
            raise HeadraceError("no features are asked for; name some, or leave features out for all")
        if repeated := sorted({name for name in wanted if wanted.count(name) > 1}):
            raise HeadraceError(f"{', '.join(repeated)} is asked for twice")
    cut = [_cut(group, {name for name in wanted if owner[name] is group}) for group in groups.values()]
    tables = [_cut_table(table, set(wanted)) for table in kinds.tables]
    return Plan(
        tuple(group for group in cut if group.measures), wanted, left_out, tuple(table for table in tables if table.columns)
    )


def _cut_table(table: TableFeatures, wanted: set[str]) -> TableFeatures:
    """The table with only the columns that are asked for; all of them still tell equal rows apart."""
    return replace(table, columns=tuple((column, value) for column, value in table.columns if value.name in wanted))


def _cut(group: FeatureGroup, wanted: set[str]) -> FeatureGroup:
    """The group with only the measures and windows that the wanted features are made of."""
    derived = tuple(entry for entry in group.derived if f"{group.entity}_{entry.name}" in wanted)
    inputs = inputs_of(derived)
    measures = []
    for measure in group.measures:
        windows = tuple(
            window
            for window in measure.windows
            if f"{group.entity}_{measure.name}_{window.name}" in wanted or f"{measure.name}_{window.name}" in inputs
        )
        if windows:
            measures.append(replace(measure, windows=windows))
    return replace(group, measures=tuple(measures), derived=derived)


def inputs_of(derived: Sequence[Derived]) -> set[str]:
    """Names of the finalized features that derived expressions read."""
    return {
        column.name
        for entry in derived
        for column in sqlglot.parse_one(entry.expression, dialect="duckdb").find_all(exp.Column)
    }
