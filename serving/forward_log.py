"""The forward log: what each request served, written to `lake.forward_log` behind the response.

A bounded queue and one writer thread. When the lake cannot keep up, rows are dropped and counted, never waited for; when a
write fails it is tried again, and what waits meanwhile is bounded by the same queue.
"""

import fcntl
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa

from warehouse.events import TIMESTAMP
from warehouse.lake import Lake

log = logging.getLogger(__name__)

FORWARD_LOG = "lake.forward_log"
RETRY_S, LONGEST_RETRY_S = 1.0, 30.0
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


class ForwardLog:
    """`offer` never blocks; `close` writes what waits."""

    def __init__(self, lake: Lake, max_waiting: int, max_rows: int, max_age_s: float, lock: Path | None = None):
        """lock: a file that processes which write the same table take turns by, as two commits at once cost one of them its
        work."""
        self._lake, self._max_waiting, self._max_rows, self._max_age_s = lake, max_waiting, max_rows, max_age_s
        self._lock = lock
        self._waiting: deque[tuple[float, Callable[[], pa.Table]]] = deque()
        self._made: list[tuple[float, pa.Table]] = []
        self._changed = threading.Condition()
        self._flush_asked = self._closing = False
        self._in_flight = 0
        self._thread: threading.Thread | None = None
        self.num_written = self.num_dropped = self.num_failed_writes = 0

    def start(self) -> None:
        """Makes the table if need be, adds columns that an older version did not write, and starts the writer."""
        self._lake.create(FORWARD_LOG, FORWARD_LOG_SCHEMA, {"request_ts": "day"})
        self._lake.evolve(FORWARD_LOG, FORWARD_LOG_SCHEMA)
        self._thread = threading.Thread(target=self._run, name="forward-log", daemon=True)
        self._thread.start()

    def offer(self, make_table: Callable[[], pa.Table]) -> bool:
        """Queues one request's row, as a table that is made later on the writer's thread; False if it was dropped because the
        queue is full."""
        with self._changed:
            if self._closing or self._num_unwritten >= self._max_waiting:
                self.num_dropped += 1
                return False
            self._waiting.append((time.monotonic(), make_table))
            self._changed.notify_all()
        return True

    @property
    def num_waiting(self) -> int:
        return self._num_unwritten + self._in_flight

    @property
    def _num_unwritten(self) -> int:
        return len(self._waiting) + len(self._made)

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
        """Makes each row soon after it was offered: that is work for the interpreter that requests share, and a batch of it at
        once would keep them waiting."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_due() or self._can_make(), self._seconds_until_due())
                is_due = self._is_due() or (self._num_unwritten > 0 and self._seconds_until_due() == 0)
                if is_due and len(self._made) < self._max_rows and self._waiting:
                    is_due = False  # first the rest of the batch is made
                if not self._num_unwritten:
                    self._flush_asked = False
                    self._changed.notify_all()
                    if self._closing:
                        return
                    continue
                if is_due:
                    batch, self._made = self._made, []
                    self._in_flight = len(batch)
                elif self._waiting:
                    since, make_table = self._waiting.popleft()
                    self._in_flight = 1
                else:
                    continue
            if is_due:
                self._write([made for _, made in batch])
            else:
                made = self._table(make_table)
            with self._changed:
                self._in_flight = 0
                if not is_due and made is not None:
                    self._made.append((since, made))
                self._changed.notify_all()

    def _can_make(self) -> bool:
        return bool(self._waiting) and len(self._made) < self._max_rows

    def _is_due(self) -> bool:
        asked = self._closing or (self._flush_asked and self._num_unwritten > 0)
        return asked or self._num_unwritten >= self._max_rows

    def _seconds_until_due(self) -> float:
        oldest = self._made or self._waiting
        return max(0.0, oldest[0][0] + self._max_age_s - time.monotonic()) if oldest else self._max_age_s

    def _write(self, tables: list[pa.Table]) -> None:
        table, pause_s = pa.concat_tables(tables), RETRY_S
        while True:
            try:
                with open(self._lock, "a") if self._lock else nullcontext() as turn:
                    if turn is not None:
                        fcntl.flock(turn, fcntl.LOCK_EX)
                    self._lake.append(FORWARD_LOG, table)
                self.num_written += table.num_rows
                return
            except Exception:  # a full disk or a locked catalogue may pass; the queue bounds what waits meanwhile
                self.num_failed_writes += 1
                log.exception("forward log: writing %d requests failed, trying again", table.num_rows)
            with self._changed:
                if self._changed.wait_for(lambda: self._closing, pause_s):
                    log.error("forward log: %d requests are lost, the server stops", table.num_rows)
                    self.num_dropped += table.num_rows
                    return
            pause_s = min(2 * pause_s, LONGEST_RETRY_S)

    def _table(self, make_table: Callable[[], pa.Table]) -> pa.Table | None:
        try:
            return make_table()
        except Exception:  # one row that does not fit the schema must not take the writer down
            log.exception("forward log: a request does not fit the schema and is dropped")
            self.num_dropped += 1
            return None
