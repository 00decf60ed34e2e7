"""Features of batch tables (`kind: table`) at request time: for each key the rows that were its last one, from which tick on.

A request at tick T reads what was known at T, as the training join does, so a row that is loaded now shows when its tick is
read and not before. Only rows that a tick still held by the online store can read are kept. `refresh` looks whether a table
has a new snapshot; one thread calls it, any number read.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streaming_sql.group_state import FeatureMatrix
from streaming_sql.key_index import Key
from warehouse.connections import duckdb_connection
from warehouse.errors import HeadraceError
from warehouse.features.kinds.declared import TableFeatures
from warehouse.features.kinds.table_compute import open_tables, prepared
from warehouse.lake import Lake
from warehouse.time_algebra import FIVE_MINUTES_US

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Loaded:
    """Rows of one snapshot, by key and then by the tick from which each was the last one. values: float64 [R, F]."""

    snapshot: str
    places: dict[Key, tuple[int, int]]
    known_us_R: np.ndarray
    values_RF: np.ndarray


class TableStore:
    """`assemble` answers for any tick from the one before the newest refresh on."""

    def __init__(self, lake: Lake, tables: Sequence[TableFeatures]):
        self.tables = tuple(tables)
        self._lake = lake
        self._loaded: dict[str, _Loaded] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def refresh(self, tick_us: int) -> None:
        """Loads the tables that have a new snapshot. tick_us: the newest tick. Raises HeadraceError for a missing table."""
        for table in self.tables:
            if not self._lake.exists(table.relation):
                raise HeadraceError(f"{table.source}: the lake has no table {table.relation}; land or build it first")
            snapshot = self._lake.table(table.relation).metadata_location
            loaded = self._loaded.get(table.name)
            if loaded is None or loaded.snapshot != snapshot:
                self._loaded[table.name] = self._load(table, snapshot, tick_us - FIVE_MINUTES_US)

    def assemble(self, table: TableFeatures, keys: Sequence[Key], tick_us: int) -> FeatureMatrix:
        """The table's features for N keys at a tick: float64 [N, F], NaN for NULL; the empty values where no row is known."""
        loaded = self._loaded[table.name]
        empty = np.array([_number(value.empty) for _, value in table.columns])
        values_NF = np.tile(empty, (len(keys), 1))
        for row, key in enumerate(keys):
            start, end = loaded.places.get(tuple(key), (0, 0))
            place = start + int(np.searchsorted(loaded.known_us_R[start:end], tick_us, "right")) - 1
            if place >= start and end > start:
                values_NF[row] = loaded.values_RF[place]
        return FeatureMatrix(table.feature_names, values_NF, {})

    def start(self, tick_us: Any, every_s: float) -> None:
        """Refreshes on a thread of its own. tick_us: a function that gives the newest tick."""
        self._thread = threading.Thread(target=self._run, args=(tick_us, every_s), name="tables", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, tick_us: Any, every_s: float) -> None:
        while not self._stop.wait(every_s):
            try:
                self.refresh(tick_us())
            except Exception:  # a table under repair must not take features away that were there
                log.exception("batch tables could not be read again; what was loaded before stands")

    def _load(self, table: TableFeatures, snapshot: str, from_us: int) -> _Loaded:
        placed, last_known = prepared(table)
        names = ", ".join(table.keys)
        same_key = " and ".join(f"steps.{key} = placed.{key}" for key in table.keys)
        with duckdb_connection() as connection:
            open_tables(self._lake, connection, [table])
            values = ", ".join(f"cast(placed.{name} as double) as {name}" for name in table.feature_names)
            found = connection.execute(
                f"""
                with steps as (
                    select
                        *,
                        lead(known_at) over (partition by {names} order by known_at) as until
                    from {last_known}
                )

                select
                    {", ".join(f"steps.{key}" for key in table.keys)},
                    epoch_us(steps.known_at) as known_us,
                    {values}
                from steps
                inner join {placed} as placed on {same_key} and steps.place = placed.place
                where steps.until is null or steps.until > make_timestamptz({from_us})
                order by {", ".join(f"steps.{key}" for key in table.keys)}, steps.known_at
                """
            ).to_arrow_table()
        places: dict[Key, tuple[int, int]] = {}
        for row, key in enumerate(zip(*(found[column].to_pylist() for column in table.keys), strict=True)):
            places[key] = (places.get(key, (row, row))[0], row + 1)
        columns = [found[name].to_numpy() for name in table.feature_names]
        matrix = np.column_stack(columns).astype(np.float64) if found.num_rows else np.empty((0, len(columns)))
        return _Loaded(snapshot, places, found["known_us"].to_numpy(), matrix)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
