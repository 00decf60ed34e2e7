"""What one feature group needs at request time, worked out once from its declaration.

A *family* is the set of measures whose windows hang from the same instant: `tick` (T), `request` (floor_5m(t)) or `event`
(floor_5m(t), plus the head). Within a family, measures of exact types are *sums* (differences of prefix sums), numbers that
cannot be subtracted are *covers* (combined over the blocks of the window), and so are *moments*, *lists* of events and *maps*.
"""

from dataclasses import dataclass

import numpy as np

from streaming_sql.entry_maps import MapShape
from streaming_sql.expressions import Compiled, compile_expression
from warehouse.features.declarations import FeatureGroup
from warehouse.features.measures import Measure
from warehouse.time_algebra import LIFETIME_US, Window

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


def cover_of(measure: Measure) -> Cover:
    return _COVERS.get(measure.aggregation, _ADDED)


@dataclass(frozen=True)
class Family:
    """Measures that share their window bounds."""

    name: str
    measures: tuple[Measure, ...]
    sum_columns: tuple[str, ...]
    lengths_us: tuple[int, ...]
    """Distinct window lengths of the sums, ascending, sessions aside: W columns of the assembly."""


@dataclass(frozen=True)
class Reads:
    """How a family's features are read: sums of exact types and averages of them all at once, the rest one by one. Of one
    (measure, window): the place of its column among the M, of its length among the W, and of the feature among the group's."""

    sums: np.ndarray
    """int64 [S, 3]: counts and sums, (m, w, feature)."""
    averages: np.ndarray
    """int64 [A, 4]: (m of the total, m of the count, w, feature)."""
    empty: np.ndarray
    """float64 [A]: an average of nothing."""
    rest: tuple[tuple[str, Measure, Window], ...]
    """(`<measure>_<window>`, measure, window), sessions among them."""

    @classmethod
    def of(cls, family: Family, place_of: dict[str, int]) -> "Reads":
        sums, averages, empty, rest = [], [], [], []
        for measure in family.measures:
            for window in measure.windows:
                name = f"{measure.name}_{window.name}"
                if not measure.is_invertible or window.session_gap_us is not None:
                    rest.append((name, measure, window))
                    continue
                columns = [family.sum_columns.index(column) for column in measure.columns]
                at = family.lengths_us.index(window.length_us), place_of[name]
                if measure.aggregation == "avg":
                    averages.append((*columns, *at))
                    empty.append(np.nan if measure.empty is None else measure.empty)
                else:
                    sums.append((columns[0], *at))
        return cls(
            np.array(sums, dtype=np.int64).reshape(-1, 3),
            np.array(averages, dtype=np.int64).reshape(-1, 4),
            np.array(empty, dtype=np.float64),
            tuple(rest),
        )


@dataclass(frozen=True)
class GroupPlan:
    """The declaration, arranged for reading."""

    group: FeatureGroup
    families: tuple[Family, ...]
    reads: dict[str, Reads]
    """By family."""
    place_of: dict[str, int]
    """`<measure>_<window>` of a number → its column among the group's features; derived ones come after."""
    covers: dict[str, Cover]
    """Block column → how it combines."""
    moments: tuple[Measure, ...]
    lists: tuple[Measure, ...]
    maps: dict[str, MapShape]
    """Measure → how its maps are stored."""
    fresh: tuple[Measure, ...]
    """Measures of the head, in declared order."""
    fresh_texts: tuple[int, ...]
    """Which of them, counted from 0, are maps whose entries are texts."""
    derived: tuple[Compiled, ...]
    keep_us: int
    """Blocks that start earlier than this before a tick are out of every window; LIFETIME_US: none ever is."""

    @property
    def keeps_for_good(self) -> bool:
        """Whether a lifetime window reads every block there ever was: memory grows with the log's age."""
        return self.keep_us == LIFETIME_US

    @classmethod
    def of(cls, group: FeatureGroup) -> "GroupPlan":
        """Raises HeadraceError if a derived expression is outside the closed list."""
        families = []
        for name in FAMILIES:
            measures = tuple(measure for measure in group.measures if family_of(measure) == name)
            sums = [measure for measure in measures if measure.is_invertible]
            lengths = sorted({w.length_us for measure in sums for w in measure.windows if w.session_gap_us is None})
            if measures:
                families.append(Family(name, measures, tuple(c for m in sums for c in m.columns), tuple(lengths)))
        covers = {
            column: cover_of(measure)
            for measure in group.measures
            if measure.representation in ("number", "extreme") and not measure.is_invertible
            for column in measure.columns
        }
        windowed = [
            f"{measure.name}_{window.name}"
            for measure in group.measures
            if measure.shape == "number"
            for window in measure.windows
        ]
        place_of = {name: place for place, name in enumerate(windowed)}
        derived = tuple(
            compile_expression(
                entry.expression, frozenset(windowed), f"{group.source}: derived feature {group.entity}_{entry.name}"
            )
            for entry in group.derived
        )
        maps = {measure.name: MapShape.of(measure) for measure in group.measures if measure.representation == "map"}
        fresh = tuple(measure for measure in group.measures if measure.freshness == "event")
        return cls(
            group,
            tuple(families),
            {family.name: Reads.of(family, place_of) for family in families},
            place_of,
            covers,
            tuple(measure for measure in group.measures if measure.representation == "moments"),
            tuple(measure for measure in group.measures if measure.representation == "events"),
            maps,
            fresh,
            tuple(place for place, m in enumerate(fresh) if m.name in maps and maps[m.name].has_texts),
            derived,
            max(window.length_us for measure in group.measures for window in measure.windows),
        )

    def keep_from_us(self, tick_us: int) -> int:
        """The first instant whose blocks some window of a view at the tick can reach; never before 1970."""
        return max(tick_us - self.keep_us, 0)
