"""What one feature group needs at request time, worked out once from its declaration.

A *family* is the set of measures whose windows hang from the same instant: `tick` (T), `request` (floor_5m(t)) or `event`
(floor_5m(t), plus the head). Within a family, measures of exact types are *sums* (differences of prefix sums), numbers that
cannot be subtracted are *covers* (combined over the blocks of the window), and last_n measures are *sequences*.
"""

from dataclasses import dataclass

import numpy as np

from streaming_sql.expressions import Compiled, compile_expression
from warehouse.features.declarations import FeatureGroup
from warehouse.features.measures import Measure
from warehouse.time_algebra import LONGEST_WINDOW_US

FAMILIES = ("tick", "request", "event")


@dataclass(frozen=True)
class Cover:
    """One column of blocks that is combined, not subtracted."""

    combine: np.ufunc
    identity: float


_COVERS = {"min": Cover(np.minimum, np.inf), "max": Cover(np.maximum, -np.inf)}
_ADDED = Cover(np.add, 0.0)


def family_of(measure: Measure) -> str:
    return "event" if measure.freshness == "event" else measure.anchor


def columns_of(measure: Measure) -> tuple[str, ...]:
    """The block columns that hold the measure's representation."""
    return (f"{measure.name}__sum", f"{measure.name}__n") if measure.aggregation == "avg" else (measure.name,)


def cover_of(measure: Measure) -> Cover:
    return _COVERS.get(measure.aggregation, _ADDED)


@dataclass(frozen=True)
class Family:
    """Measures that share their window bounds."""

    name: str
    measures: tuple[Measure, ...]
    sum_columns: tuple[str, ...]
    lengths_us: tuple[int, ...]
    """Distinct window lengths of the sums, ascending: W columns of the assembly."""


@dataclass(frozen=True)
class GroupPlan:
    """The declaration, arranged for reading."""

    group: FeatureGroup
    families: tuple[Family, ...]
    covers: dict[str, Cover]
    """Block column → how it combines."""
    sequences: tuple[Measure, ...]
    fresh: tuple[Measure, ...]
    """Measures of the head, in declared order."""
    derived: tuple[Compiled, ...]
    keep_us: int
    """Blocks that start earlier than this before a tick are out of every window."""

    @classmethod
    def of(cls, group: FeatureGroup) -> "GroupPlan":
        """Raises HeadraceError if a derived expression is outside the closed list."""
        families = []
        for name in FAMILIES:
            measures = tuple(measure for measure in group.measures if family_of(measure) == name)
            sums = [measure for measure in measures if measure.is_invertible]
            lengths = sorted({window.length_us for measure in sums for window in measure.windows})
            if measures:
                families.append(Family(name, measures, tuple(c for m in sums for c in columns_of(m)), tuple(lengths)))
        covers = {
            column: cover_of(measure)
            for measure in group.measures
            if not measure.is_invertible and not measure.is_sequence
            for column in columns_of(measure)
        }
        windowed = frozenset(
            f"{measure.name}_{window.name}"
            for measure in group.measures
            if not measure.is_sequence
            for window in measure.windows
        )
        derived = tuple(
            compile_expression(entry.expression, windowed, f"{group.source}: derived feature {group.entity}_{entry.name}")
            for entry in group.derived
        )
        longest = max(window.length_us for measure in group.measures for window in measure.windows)
        return cls(
            group,
            tuple(families),
            covers,
            tuple(measure for measure in group.measures if measure.is_sequence),
            tuple(measure for measure in group.measures if measure.freshness == "event"),
            derived,
            min(longest, LONGEST_WINDOW_US),
        )
