"""Which files of the lake's events hold an event, a retraction of one, or events of a 5-minute block.

A data file never changes, so each has an index file beside the online store: hashes of its event ids and of the ids that it
retracts, and its blocks, all sorted. Who looks for few events opens few files. A hash says where an id may be, not that it is.
"""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import duckdb
import numpy as np

from streaming_sql.array_file import map_arrays, write_arrays
from warehouse.lake import quoted
from warehouse.time_algebra import FIVE_MINUTES_US

_LOG = logging.getLogger("headrace.stream")
INDEX_FOLDER = "event-index"
"""Below `Home.online`."""
BLOCK = f"epoch_us(event_ts) // {FIVE_MINUTES_US}"
"""SQL: the number of an event's 5-minute block."""
_SUFFIX = ".arrays"
_COLUMNS = {
    "event_id": "md5_number_lower(event_id)",
    "retracts": "md5_number_lower(retracts)",
    "block": BLOCK,
}


def sought(column: str, values: str) -> str:
    """`select` of what to look for in a column of the index. values: a query of one column, of texts or block numbers."""
    value = "value" if column == "block" else "md5_number_lower(value)"
    return f"select distinct {value} as sought from ({values}) as wanted(value) where value is not null"


class EventIndex:
    """Safe from several threads, and from other processes on the same folder."""

    def __init__(self, folder: Path):
        self._folder, self._lock = folder, threading.Lock()
        self._of_file: dict[str, dict[str, np.ndarray]] = {}
        """By path of the data file."""
        self._is_told = False

    def follow(self, paths: Sequence[str]) -> None:
        """Knows these data files from now on, and no others."""
        with self._lock:
            if self._of_file.keys() == set(paths):
                return
            with duckdb.connect(config={"threads": 1}) as connection:
                connection.execute("set TimeZone = 'UTC'")
                self._of_file = {path: self._of_file.get(path) or self._index(connection, Path(path)) for path in paths}
            kept = {f"{Path(path).name}{_SUFFIX}" for path in paths}
            for left in self._folder.glob(f"*{_SUFFIX}"):
                if left.name not in kept:
                    left.unlink(missing_ok=True)

    def holding(self, column: str, values: np.ndarray) -> list[str]:
        """The files that may have one of the values (`sought`) in the column: event_id, retracts or block."""
        return [path for path, arrays in self._of_file.items() if _has_any(arrays[column], values)]

    def _index(self, connection: duckdb.DuckDBPyConnection, path: Path) -> dict[str, np.ndarray]:
        where = self._folder / f"{path.name}{_SUFFIX}"
        try:
            arrays = map_arrays(where)
            if arrays.keys() == _COLUMNS.keys():
                return arrays
        except (OSError, ValueError):
            pass  # not made yet, or cut short by a full disk
        arrays = _made(connection, path)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_arrays(where, arrays)
            return map_arrays(where)
        except OSError as error:
            if not self._is_told:
                _LOG.warning("the index of events stays in memory: %s", error)
            self._is_told = True
            return arrays


def _made(connection: duckdb.DuckDBPyConnection, path: Path) -> dict[str, np.ndarray]:
    found = connection.execute(
        f"select {', '.join(f'{sql} as {column}' for column, sql in _COLUMNS.items())} from read_parquet({quoted(str(path))})"
    ).to_arrow_table()
    return {column: np.unique(found[column].drop_null().to_numpy()) for column in _COLUMNS}


def _has_any(sorted_K: np.ndarray, values: np.ndarray) -> bool:
    if not len(sorted_K) or not len(values):
        return False
    places = np.minimum(np.searchsorted(sorted_K, values), len(sorted_K) - 1)
    return bool((sorted_K[places] == values).any())
