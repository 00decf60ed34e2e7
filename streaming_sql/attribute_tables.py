"""The tables that add to light events, for a running feed: read again when the lake has more and a new tick could show it.

A row counts for events that land a tick after it was available at the earliest (`warehouse.features.attributes`), so a look at
the lake before the first records of each tick is enough, and whoever reads the same records later sees the same rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import pyarrow as pa

from warehouse.errors import HeadraceError
from warehouse.features.attributes import Attributes
from warehouse.features.declarations import FeatureGroup
from warehouse.lake import Lake


class AttributeTables(Protocol):
    """What the feed asks about tables beside the log."""

    def changed(self) -> Iterator[tuple[str, pa.Table]]:
        """(`namespace.table`, its rows) of every table with rows that the last call did not give."""


class LakeTables:
    """The tables of the lake. Not thread-safe."""

    def __init__(self, lake: Lake, groups: Mapping[str, FeatureGroup]):
        self._lake, self._attributes = lake, _attributes(groups)
        self._given: dict[str, str] = {}

    def changed(self) -> Iterator[tuple[str, pa.Table]]:
        """Raises HeadraceError for a table that the lake does not have."""
        columns: dict[str, tuple[str, ...]] = {}
        for entry in self._attributes:
            if not self._lake.exists(entry.relation):
                raise HeadraceError(f"{entry.source}: the lake has no table {entry.relation}; land or build it first")
            columns[entry.relation] = tuple(dict.fromkeys((*columns.get(entry.relation, ()), *entry.table_columns)))
        for relation, names in columns.items():
            snapshot = self._lake.table(relation).metadata_location
            if self._given.get(relation) != snapshot:
                yield relation, self._lake.scan(relation, columns=names)
                self._given[relation] = snapshot


def _attributes(groups: Mapping[str, FeatureGroup]) -> Sequence[Attributes]:
    return next((group.attributes for group in groups.values()), ())
