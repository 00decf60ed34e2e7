"""The forward log: what each request served, written to `lake.forward_log` behind the response.

A bounded queue and one writer thread. When the lake cannot keep up, rows are dropped and counted, never waited for; when a
write fails it is tried again, and what waits meanwhile is bounded by the same queue.
"""

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from enum import Enum, auto
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa
from pyiceberg.manifest import DataFile
from pyiceberg.table import TableProperties

from warehouse.events import TIMESTAMP
from warehouse.lake import Lake
from warehouse.locks import in_turn

log = logging.getLogger(__name__)

Item = TypeVar("Item")

FORWARD_LOG = "lake.forward_log"
BATCH = "headrace.batch"
"""Property of a snapshot: the number of the batch that it added."""
_FILES = {
    TableProperties.PARQUET_DICT_SIZE_BYTES: "65536",
    TableProperties.PARQUET_COMPRESSION_LEVEL: "1",
}
"""Encoding takes two thirds of what it does by default, for a fiftieth more bytes: scores and ids are rarely the same twice."""
RETRY_S, LONGEST_RETRY_S = 1.0, 30.0
_WANTED_AT_ONCE, _MADE_AT_ONCE, _MADE_WITHIN_S = 8, 16, 1.0
"""Rows that are made together cost a third each; more of them would hold the interpreter that requests share for long."""
_LOOKS_EVERY_S, _WAITS_FOR_REST_S = 0.002, 0.1
"""Rows are made while no request is under way, if there are such moments within this time: one that is computed beside them
waits for the interpreter, up to twice as long as it takes alone. Not before the first look: the answer to the request that was
just offered is on its way."""
_MADE_EVERY_S = 0.03
"""Of what waited for a write; without a rest requests would find the interpreter busy for a tenth of a second."""
_FEATURES = pa.map_(pa.string(), pa.float64())
_SEQUENCES = pa.map_(pa.string(), pa.list_(pa.string()))
_MAPS = pa.map_(pa.string(), _FEATURES)

CANDIDATE = pa.struct(
    [
        pa.field("impression_id", pa.string()),
        pa.field("note_id", pa.string()),
        pa.field("author_id", pa.string()),
        pa.field("sources", pa.list_(pa.string())),
        pa.field("recall_score", pa.float64()),
        pa.field("l1_score", pa.float64()),
        pa.field("final_score", pa.float64()),
        pa.field("position", pa.int32()),
        pa.field("shown", pa.bool_()),
        pa.field("slot", pa.string()),
        pa.field("propensity", pa.float64()),
        pa.field("features", _FEATURES),
        pa.field("predictions", _FEATURES),
        pa.field("sequences", _SEQUENCES),
        pa.field("maps", _MAPS),
    ]
)

FORWARD_LOG_SCHEMA = pa.schema(
    [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("feed_type", pa.string(), nullable=False),
        pa.field("request_ts", TIMESTAMP, nullable=False),
        pa.field("feature_watermark", TIMESTAMP, nullable=False),
        pa.field("known_position", pa.list_(pa.int64()), nullable=False),
        pa.field("declarations_hash", pa.string(), nullable=False),
        pa.field("model_versions", pa.string(), nullable=False),
        pa.field("degraded", pa.list_(pa.string()), nullable=False),
        pa.field("timings_ms", pa.string(), nullable=False),
        pa.field("user_features", _FEATURES, nullable=False),
        pa.field("user_sequences", _SEQUENCES, nullable=False),
        pa.field("candidates", pa.list_(CANDIDATE), nullable=False),
        pa.field("user_maps", _MAPS),
    ]
)


def _with_codes(kind: pa.DataType) -> pa.DataType:
    """The type with a text, the texts of a list or the keys of a map as numbers into a list of texts."""
    if pa.types.is_string(kind):
        return pa.dictionary(pa.int32(), kind)
    if pa.types.is_map(kind):
        return pa.map_(_with_codes(kind.key_type), kind.item_type)
    assert pa.types.is_list(kind)
    return pa.list_(_with_codes(kind.value_type))


_CODED_FIELDS = {"note_id", "author_id", "sources", "features", "predictions"}
CODED_CANDIDATE = pa.struct([one.with_type(_with_codes(one.type)) if one.name in _CODED_FIELDS else one for one in CANDIDATE])
CODED_SCHEMA = FORWARD_LOG_SCHEMA.set(
    FORWARD_LOG_SCHEMA.get_field_index("candidates"), pa.field("candidates", pa.list_(CODED_CANDIDATE), nullable=False)
)
"""FORWARD_LOG_SCHEMA where texts that come with every request are numbers into a list of them: how rows are kept and sent until
they are written. Three fifths of the bytes, and the texts are looked up by the process that writes."""


def rows_to_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as `Served.as_row` gives them (dicts for maps, microseconds for instants) in FORWARD_LOG_SCHEMA."""
    return pa.Table.from_pylist([_with_pairs(row) for row in rows], schema=FORWARD_LOG_SCHEMA)


def _with_pairs(row: Mapping[str, Any]) -> dict[str, Any]:
    """Arrow takes a map as a list of pairs."""
    candidates = [
        {
            **candidate,
            **{name: _pairs(candidate[name]) for name in ("predictions", "features", "sequences")},
            "maps": _pairs_of_pairs(candidate["maps"]),
        }
        for candidate in row["candidates"]
    ]
    return {
        **row,
        "user_features": _pairs(row["user_features"]),
        "user_sequences": _pairs(row["user_sequences"]),
        "user_maps": _pairs_of_pairs(row["user_maps"]),
        "candidates": candidates,
    }


def _pairs(mapping: Mapping[str, Any] | None) -> list[tuple[str, Any]] | None:
    return None if mapping is None else list(mapping.items())


def _pairs_of_pairs(maps: Mapping[str, Mapping[str, Any]] | None) -> list[tuple[str, Any]] | None:
    return None if maps is None else [(name, list(entries.items())) for name, entries in maps.items()]


def write_once(lake: Lake, table: pa.Table, batch: uuid.UUID, lock: Path | None = None) -> None:
    """Appends the rows, unless a batch of this number was. table: in CODED_SCHEMA or FORWARD_LOG_SCHEMA."""
    commit_once(lake, lake.write_files(FORWARD_LOG, table), batch, lock)


def commit_once(lake: Lake, files: Sequence[DataFile], batch: uuid.UUID, lock: Path | None = None) -> None:
    """Adds the files, unless a batch of this number was: whoever wrote it may have died before it could say so.

    lock: a file that processes which write the same table take turns by, as two commits at once cost one of them its work."""
    with in_turn(lock) if lock else nullcontext():
        there = lake.table(FORWARD_LOG)
        if any(one.summary is not None and one.summary.get(BATCH) == str(batch) for one in reversed(there.metadata.snapshots)):
            for file in files:
                there.io.delete(file.file_path)
        else:
            lake.add_files(FORWARD_LOG, files, {BATCH: str(batch)})


class Elsewhere(Protocol):
    """Another process that writes."""

    def send_ahead(self, rows: pa.Table) -> None:
        """Takes rows of the next `write`."""

    def write(self, tables: Sequence[pa.Table], batch: uuid.UUID) -> None:
        """Returns once all rows of the batch are in the lake."""


class _Turn(Enum):
    MAKE, WRITE, REST, END = auto(), auto(), auto(), auto()


class ForwardLog(Generic[Item]):
    """`offer` never blocks; `close` writes what waits."""

    def __init__(
        self,
        lake: Lake,
        max_waiting: int,
        max_rows: int,
        max_age_s: float,
        make: Callable[[Sequence[Item], Callable[[], None]], pa.Table],
        lock: Path | None = None,
        elsewhere: Elsewhere | None = None,
        is_resting: Callable[[], bool] = lambda: True,
    ):
        """make: rows in CODED_SCHEMA of what was offered, on the writer's thread; it calls its second argument between parts of
        the work. lock: as of `write_once`. Without `elsewhere` a batch is written here, and so is the last one, as nothing is
        disturbed then. is_resting: whether nobody is disturbed by rows that are made now."""
        self._lake, self._max_waiting, self._max_rows, self._max_age_s = lake, max_waiting, max_rows, max_age_s
        self._make_table, self._lock, self._elsewhere, self._is_resting = make, lock, elsewhere, is_resting
        self._waiting: deque[tuple[float, Item]] = deque()
        self._made: list[tuple[float, pa.Table]] = []
        self._changed = threading.Condition()
        self._flush_asked = self._closing = False
        self._in_flight = 0
        self._waits_until_s = 0.0
        self._thread: threading.Thread | None = None
        self.num_written = self.num_dropped = self.num_failed_writes = 0

    def start(self) -> None:
        """Makes the table if need be, adds columns that an older version did not write, and starts the writer."""
        self._lake.create(FORWARD_LOG, FORWARD_LOG_SCHEMA, {"request_ts": "day"})
        self._lake.evolve(FORWARD_LOG, FORWARD_LOG_SCHEMA)
        self._lake.set_properties(FORWARD_LOG, _FILES)
        self._thread = threading.Thread(target=self._run, name="forward-log", daemon=True)
        self._thread.start()

    def offer(self, item: Item) -> bool:
        """Queues one request, whose row is made later; False if it was dropped because the queue is full."""
        with self._changed:
            if self._closing or self._num_unwritten >= self._max_waiting:
                self.num_dropped += 1
                return False
            self._waiting.append((time.monotonic(), item))
            if self._num_unwritten == 1 or len(self._waiting) in (_WANTED_AT_ONCE, _MADE_AT_ONCE):
                self._changed.notify_all()
        return True

    @property
    def num_waiting(self) -> int:
        return self._num_unwritten + self._in_flight

    @property
    def _num_unwritten(self) -> int:
        return len(self._waiting) + self._num_made

    @property
    def _num_made(self) -> int:
        return sum(table.num_rows for _, table in self._made)

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Writes what waits now; False if that took longer than the timeout."""
        with self._changed:
            self._flush_asked = self.num_waiting > 0
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self.num_waiting == 0, timeout_s)

    def close(self, timeout_s: float = 30.0) -> None:
        """Takes no more rows, writes what waits and stops the writer."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self.num_waiting:
                log.error("forward log: %d requests could not be written before the stop", self.num_waiting)

    def _run(self) -> None:
        while True:
            with self._changed:
                while (turn := self._turn()) is _Turn.REST:
                    self._changed.wait(self._seconds_of_rest())
                if turn is _Turn.END:
                    return
                if turn is _Turn.MAKE:
                    self._wait_for_rest()
                    some = [self._waiting.popleft() for _ in range(min(len(self._waiting), _MADE_AT_ONCE))]
                    self._in_flight = len(some)
                else:
                    tables, self._made = [table for _, table in self._made], []
                    self._in_flight = sum(table.num_rows for table in tables)
            made = None
            if turn is _Turn.MAKE:
                made = self._make([item for _, item in some])
                if made is not None and self._elsewhere is not None:
                    self._elsewhere.send_ahead(made)
            else:
                self._write(tables)
            with self._changed:
                self._in_flight = 0
                if made is not None:
                    self._made.append((some[0][0], made))
                if turn is _Turn.MAKE and self._waiting:
                    self._changed.wait_for(lambda: self._is_asked, _MADE_EVERY_S)
                if not self._num_unwritten:
                    self._flush_asked = False
                self._changed.notify_all()

    def _turn(self) -> _Turn:
        if not self._num_unwritten:
            return _Turn.END if self._closing else _Turn.REST
        is_due = self._is_asked or self._num_unwritten >= self._max_rows or self._age_s(self._oldest()) >= self._max_age_s
        if self._waiting and self._num_made < self._max_rows:
            has_waited = self._age_s(self._waiting[0][0]) >= _MADE_WITHIN_S
            if is_due or len(self._waiting) >= _WANTED_AT_ONCE or has_waited:
                return _Turn.MAKE
        return _Turn.WRITE if is_due else _Turn.REST

    def _wait_for_rest(self) -> None:
        """Within `_changed`, which is free meanwhile."""
        self._waits_until_s = time.monotonic() + _WAITS_FOR_REST_S
        while self._may_wait():
            self._changed.wait(_LOOKS_EVERY_S)
            if self._is_resting():
                return

    def _pause(self) -> None:
        """While rows are made, if a request has come meanwhile."""
        while not self._is_resting() and self._may_wait():
            time.sleep(_LOOKS_EVERY_S)

    def _may_wait(self) -> bool:
        """Not for long, and not once as many wait as are made at once."""
        return not self._is_asked and len(self._waiting) < _MADE_AT_ONCE and time.monotonic() < self._waits_until_s

    @property
    def _is_asked(self) -> bool:
        return self._closing or self._flush_asked

    def _seconds_of_rest(self) -> float | None:
        """Until what waits has waited long enough; None for as long as nothing does."""
        if not self._num_unwritten:
            return None
        until_written_s = self._max_age_s - self._age_s(self._oldest())
        until_made_s = _MADE_WITHIN_S - self._age_s(self._waiting[0][0]) if self._waiting else until_written_s
        return max(0.0, min(until_written_s, until_made_s))

    def _oldest(self) -> float:
        return (self._made or self._waiting)[0][0]

    @staticmethod
    def _age_s(since: float) -> float:
        return time.monotonic() - since

    def _write(self, tables: Sequence[pa.Table]) -> None:
        batch, pause_s, num_rows = uuid.uuid4(), RETRY_S, sum(table.num_rows for table in tables)
        while True:
            is_last = self._closing
            try:
                if self._elsewhere is None or is_last:
                    write_once(self._lake, pa.concat_tables(tables), batch, self._lock)
                else:
                    self._elsewhere.write(tables, batch)
                self.num_written += num_rows
                return
            except Exception:  # a full disk or a locked catalogue may pass; the queue bounds what waits meanwhile
                self.num_failed_writes += 1
                log.exception("forward log: writing %d requests failed, trying again", num_rows)
            if is_last:
                log.error("forward log: %d requests are lost, the server stops", num_rows)
                self.num_dropped += num_rows
                return
            with self._changed:
                self._changed.wait_for(lambda: self._closing, pause_s)
            pause_s = min(2 * pause_s, LONGEST_RETRY_S)

    def _make(self, items: list[Item]) -> pa.Table | None:
        try:
            return self._make_table(items, self._pause)
        except Exception:  # one row that does not fit the schema must not take the writer down, nor the others with it
            if len(items) > 1:
                tables = [table for item in items if (table := self._make([item])) is not None]
                return pa.concat_tables(tables) if tables else None
            log.exception("forward log: a request does not fit the schema and is dropped")
            self.num_dropped += 1
            return None
