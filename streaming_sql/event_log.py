"""The event log: acknowledged means durable, read by position, deduplicated on event_id.

`Log` is the interface; `EventLog`, the embedded one, keeps it in one SQLite file (WAL, synchronous=FULL), which several
threads and processes may append to and read at once. Concurrent appends share one transaction and one fsync (group
commit): whoever gets the writer's lock commits for everyone who is waiting. Knows nothing of features.
"""

import sqlite3
import threading
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from streaming_sql.records import ROW_FIELDS, DeadLetter, dead_letter_row, heartbeat_row, to_rows, to_table
from warehouse.clock import Clock
from warehouse.errors import HeadraceError
from warehouse.events import EVENTS_SCHEMA, NUM_PARTITIONS, partition_of
from warehouse.time_algebra import DUPLICATE_MEMORY_US, SECOND_US

Position = tuple[int, ...]
"""Next offset to read, one per log partition."""

_EVENT_ID, _USER_ID = ROW_FIELDS.index("event_id"), ROW_FIELDS.index("user_id")
_STORED = tuple(field.name for field in EVENTS_SCHEMA if field.name != "landing")
_BUSY_SECONDS = 30.0
_IDS_PER_QUERY = 500


class Log(Protocol):
    """What the collector, the runner and the lander rely on, whatever keeps the log. Safe to call from any thread."""

    num_partitions: int

    def append(self, events: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
        """(partition, offset) of each event, durable on return; a known event_id is answered with its first position."""

    def append_dead_letters(self, letters: Sequence[DeadLetter]) -> None:
        """Keeps what is no event, with the reason, durable on return; readers count it as dead, the lander buries it."""

    def read(self, position: Position, limit: int) -> pa.Table:
        """The next `limit` records from `position` in EVENTS_SCHEMA, by (landed_at, log_partition, log_offset), no gaps.

        What this process appended before is there. Raises HeadraceError if retention has dropped records at `position`."""

    def start(self) -> Position:
        """The position of the oldest record that is kept; what was before it is in the lake."""

    def end(self) -> Position:
        """The position after the last record."""

    def offset_of(self, partition: int, own: int) -> int:
        """The offset, as positions here count, of what has the offset `own` where the log is kept: imports move them apart."""

    def read_through_us(self) -> tuple[int, ...]:
        """Largest landed_at of each partition (0: nothing yet), microseconds."""

    def heartbeat(self, idle_us: int = SECOND_US) -> int:
        """Writes a heartbeat to every partition that got nothing for `idle_us`; returns how many."""

    def commit(self, reader: str, position: Position) -> None:
        """Keeps how far a named reader has come; any number of readers, none moves another."""

    def committed(self, reader: str) -> Position | None:
        """Where a named reader said it is; None if it never did."""

    def landed(self) -> Position:
        """What `mark_landed` was last told."""

    def mark_landed(self, landed: Position) -> None:
        """Remembers that records below `landed` are in the lake."""

    def trim(self, landed: Position, keep_us: int, max_bytes: int | None = None) -> int:
        """Drops records older than keep_us, or more where the log is larger than max_bytes, but none at or past `landed`;
        returns how many."""

    def ids(self, partition: int, start: int, end: int) -> dict[int, str]:
        """offset → event_id of the records of one partition with start <= offset < end that are kept."""

    def renumber(self, landed: Position, not_before_us: int) -> None:
        """Moves what has not landed to positions from `landed` on, after an import took theirs in the lake."""

    def num_bytes(self) -> int | None:
        """Size, bytes; None where only a broker knows."""

    def close(self) -> None: ...


_NO_RECORDS = to_table([])


class _Append:
    """One caller's rows, waiting for whoever commits next."""

    def __init__(self, rows: list[tuple]):
        self.rows = rows
        self.positions: list[tuple[int, int]] | None = None
        self.error: HeadraceError | None = None

    def finished(self) -> bool:
        return self.positions is not None or self.error is not None


class EventLog:
    """The embedded event log: one SQLite file."""

    def __init__(self, path: Path, num_partitions: int, clock: Clock):
        """Use `open`."""
        self.path, self.num_partitions, self._clock = path, num_partitions, clock
        self._waiting: list[_Append] = []
        self._waiting_lock, self._writer_lock, self._reader_lock = threading.Lock(), threading.Lock(), threading.Lock()
        self._writer, self._reader = self._connect(), self._connect()
        self.num_commits = 0
        self._seen_newest = (0,) * num_partitions
        """landed_at of each partition when `heartbeat` last looked: it only grows."""
        self._nothing_at: tuple[int, Position] | None = None
        """SQLite's version of the file, and the position, at which a read found nothing: until it changes there is nothing."""

    @classmethod
    def open(
        cls,
        path: Path,
        num_partitions: int = NUM_PARTITIONS,
        clock: Clock | None = None,
        start: Position | None = None,
        not_before_us: int = 0,
    ) -> "EventLog":
        """Opens the log in `path` (a folder, or a file ending in .db), making it if need be.

        start: the first offsets of a log that is made now (`landed_position(lake)`), zeros by default; a log that exists
        keeps its own. not_before_us: landed_at of a new log starts at or after it (the newest landed_at in the lake).
        Raises HeadraceError if the file is not a log or has other partitions.
        """
        file = path if path.suffix == ".db" else path / "events.db"
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            log = cls(file, num_partitions, clock or Clock())
            log._create(start or (0,) * num_partitions, not_before_us)
        except sqlite3.Error as error:
            raise HeadraceError(f"cannot open the event log {file}: {error}") from error
        return log

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = full")
        return connection

    def _create(self, start: Position, not_before_us: int) -> None:
        if len(start) != self.num_partitions:
            raise HeadraceError(f"start must have {self.num_partitions} offsets, one per partition, got {start}")
        self._writer.execute("begin immediate")
        try:
            self._writer.execute(
                "create table if not exists partitions (log_partition integer primary key, first_offset integer not null, "
                "next_offset integer not null, landed_at integer not null, landed_offset integer not null)"
            )
            columns = ", ".join(f"{name} integer not null" if name in _NUMBERS else f"{name} text" for name in _STORED)
            self._writer.execute(
                f"create table if not exists records ({columns}, primary key (log_partition, log_offset)) without rowid"
            )
            self._writer.execute(
                "create table if not exists ids (event_id text primary key, log_partition integer not null, "
                "log_offset integer not null, landed_at integer not null) without rowid"
            )
            self._writer.execute("create index if not exists ids_by_age on ids (landed_at)")
            self._writer.execute(
                "create table if not exists readers (reader text, log_partition integer, next_offset integer not null, "
                "primary key (reader, log_partition)) without rowid"
            )
            (made,) = self._writer.execute("select count(*) from partitions").fetchone()
            if not made:
                self._writer.executemany(
                    "insert into partitions values (?, ?, ?, ?, ?)",
                    [(partition, offset, offset, not_before_us, offset) for partition, offset in enumerate(start)],
                )
            self._writer.execute("commit")
        except BaseException:
            self._writer.execute("rollback")
            raise
        if made and made != self.num_partitions:
            raise HeadraceError(f"event log {self.path} has {made} partitions, asked for {self.num_partitions}")

    def renumber(self, landed: Position, not_before_us: int) -> None:
        """Moves the records that have not landed to offsets from `landed` on, after an import took theirs in the lake.

        They land at or after not_before_us (the newest landed_at in the lake) and keep their order; what has landed is dropped.
        Not for a log that others are reading.
        """
        with self._writer_lock:
            self._writer.execute("begin immediate")
            try:
                for partition, (to_offset, mark) in enumerate(
                    zip(landed, self._column(self._writer, "landed_offset"), strict=True)
                ):
                    self._writer.execute("delete from records where log_partition = ? and log_offset < ?", (partition, mark))
                    values = {"shift": to_offset - mark, "at_us": not_before_us, "partition": partition}
                    # by way of negative offsets, which collide with nothing
                    self._writer.execute(
                        "update records set log_offset = -1 - (log_offset + :shift), landed_at = max(landed_at, :at_us) "
                        "where log_partition = :partition",
                        values,
                    )
                    self._writer.execute(
                        "update records set log_offset = -1 - log_offset where log_partition = ?", (partition,)
                    )
                    self._writer.execute(
                        "update ids set log_offset = log_offset + :shift "
                        "where log_partition = :partition and log_offset >= :mark",
                        {**values, "mark": mark},
                    )
                    self._writer.execute(
                        "update partitions set next_offset = next_offset + :shift, first_offset = :first, "
                        "landed_offset = :first, landed_at = max(landed_at, :at_us) where log_partition = :partition",
                        {**values, "first": to_offset},
                    )
                self._writer.execute("commit")
            except BaseException:
                self._writer.execute("rollback")
                raise

    def landed(self) -> Position:
        """What `mark_landed` was last told."""
        with self._reader_lock:
            return self._column(self._reader, "landed_offset")

    def ids(self, partition: int, start: int, end: int) -> dict[int, str]:
        """offset → event_id of the records of one partition with start <= offset < end that the log still holds."""
        query = "select log_offset, event_id from records where log_partition = ? and log_offset >= ? and log_offset < ?"
        with self._reader_lock:
            return dict(self._reader.execute(query, (partition, start, end)))

    def mark_landed(self, landed: Position) -> None:
        """Remembers that records below `landed` are in the lake; `trim` may drop them."""
        with self._writer_lock:
            self._writer.execute("begin immediate")
            self._writer.executemany(
                "update partitions set landed_offset = max(landed_offset, min(?, next_offset)) where log_partition = ?",
                [(offset, partition) for partition, offset in enumerate(landed)],
            )
            self._writer.execute("commit")

    def close(self) -> None:
        """Closes both connections; nothing is lost by not calling it."""
        with self._writer_lock, self._reader_lock:
            self._writer.close()
            self._reader.close()

    def append(self, events: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
        """Stores events durably; all of them or, with HeadraceError naming the first bad one, none.

        events: dicts with the columns of lake.events less what the log stamps; `event_ts` as microseconds, an aware
        datetime or ISO text; `properties` as a dict or JSON text. Returns each one's (partition, offset); an event_id
        seen within H is answered with its first position and not stored again.
        """
        return self._append_rows(to_rows(events))

    def append_dead_letters(self, letters: Sequence[DeadLetter]) -> None:
        """Keeps what is no event, with the reason, until the lander buries it. The same letter again is not stored twice."""
        self._append_rows([dead_letter_row(letter, self._clock.now_us()) for letter in letters])

    def _append_rows(self, rows: list[tuple]) -> list[tuple[int, int]]:
        if not rows:
            return []
        mine = _Append(rows)
        with self._waiting_lock:
            self._waiting.append(mine)
        with self._writer_lock:
            if not mine.finished():
                self._commit_waiting()
        if mine.error is not None:
            raise mine.error
        assert mine.positions is not None
        return mine.positions

    def _commit_waiting(self) -> None:
        with self._waiting_lock:
            batch, self._waiting = self._waiting, []
        try:
            self._writer.execute("begin immediate")
            try:
                positions = self._store([row for append in batch for row in append.rows])
                self._writer.execute("commit")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("rollback")
                raise
        except BaseException as failure:
            error = HeadraceError(f"event log {self.path} did not take the events: {failure}")
            error.__cause__ = failure
            for append in batch:
                append.error = error
            if not isinstance(failure, sqlite3.Error):
                raise
            return
        self.num_commits += 1
        start = 0
        for append in batch:
            append.positions = positions[start : start + len(append.rows)]
            start += len(append.rows)

    def _store(self, rows: list[tuple]) -> list[tuple[int, int]]:
        """Inside the write transaction: stamps, deduplicates and inserts."""
        now_us = self._clock.now_us()
        state = self._state()
        known = self._first_positions([row[_EVENT_ID] for row in rows], now_us - DUPLICATE_MEMORY_US)
        positions, records, ids = [], [], []
        for row in rows:
            event_id = row[_EVENT_ID]
            position = known.get(event_id)
            if position is None:
                partition = partition_of(row[_USER_ID], self.num_partitions)
                offset, landed_at = state[partition]
                landed_at = max(landed_at, now_us)
                state[partition] = [offset + 1, landed_at]
                position = known[event_id] = (partition, offset)
                records.append(_record(row, landed_at, partition, offset))
                ids.append((event_id, partition, offset, landed_at))
            positions.append(position)
        self._insert(records, state)
        self._writer.executemany("insert or replace into ids values (?, ?, ?, ?)", ids)
        return positions

    def _insert(self, records: list[tuple], state: dict[int, list[int]]) -> None:
        marks = ", ".join("?" * len(_STORED))
        self._writer.executemany(f"insert into records values ({marks})", records)
        self._writer.executemany(
            "update partitions set next_offset = ?, landed_at = ? where log_partition = ?",
            [(offset, landed_at, partition) for partition, (offset, landed_at) in state.items()],
        )

    def _column(self, connection: sqlite3.Connection, name: str) -> tuple[int, ...]:
        """One number per partition."""
        return tuple(value for (value,) in connection.execute(f"select {name} from partitions order by log_partition"))

    def _state(self) -> dict[int, list[int]]:
        """partition -> [next offset, largest landed_at], inside a write transaction."""
        offsets, landed = self._column(self._writer, "next_offset"), self._column(self._writer, "landed_at")
        return {partition: list(pair) for partition, pair in enumerate(zip(offsets, landed, strict=True))}

    def _first_positions(self, event_ids: list[str], since_us: int) -> dict[str, tuple[int, int]]:
        known = {}
        for start in range(0, len(event_ids), _IDS_PER_QUERY):
            some = event_ids[start : start + _IDS_PER_QUERY]
            query = f"select * from ids where event_id in ({', '.join('?' * len(some))}) and landed_at >= ?"
            for event_id, partition, offset, _ in self._writer.execute(query, [*some, since_us]):
                known[event_id] = (partition, offset)
        return known

    def read(self, position: Position, limit: int) -> pa.Table:
        """The next at most `limit` records at or after `position`, by (landed_at, log_partition, log_offset).

        Nothing is skipped: each partition's records are contiguous from its offset. Raises HeadraceError if retention
        has dropped records at `position` (read them from the lake), ValueError if limit is not positive.
        """
        if limit <= 0:
            raise ValueError(f"limit must be positive, got {limit}")
        if len(position) != self.num_partitions:
            raise ValueError(f"position must have {self.num_partitions} offsets, got {position}")
        one = f"select {_SELECTED} from records where log_partition = ? and log_offset >= ? order by log_offset limit ?"
        query = " union all ".join([f"select * from ({one})"] * self.num_partitions)
        query += " order by landed_at, log_partition, log_offset limit ?"
        arguments = [argument for pair in enumerate(position) for argument in (*pair, limit)]
        with self._reader_lock:
            (version,) = self._reader.execute("pragma data_version").fetchone()
            if self._nothing_at == (version, tuple(position)):
                return _NO_RECORDS
            self._reader.execute("begin")
            try:
                kept = self._column(self._reader, "first_offset")
                rows = self._reader.execute(query, [*arguments, limit]).fetchall()
            finally:
                self._reader.execute("commit")
        if any(offset < first for offset, first in zip(position, kept, strict=True)):
            raise HeadraceError(
                f"event log {self.path} keeps records from {list(kept)} on, asked for {list(position)}: read the lake first"
            )
        if not rows:
            self._nothing_at = version, tuple(position)
        return to_table(rows)

    def commit(self, reader: str, position: Position) -> None:
        """Keeps how far a named reader has come."""
        with self._writer_lock:
            self._writer.execute("begin immediate")
            self._writer.executemany(
                "insert or replace into readers values (?, ?, ?)",
                [(reader, partition, offset) for partition, offset in enumerate(position)],
            )
            self._writer.execute("commit")

    def committed(self, reader: str) -> Position | None:
        """Where a named reader said it is; None if it never did."""
        query = "select next_offset from readers where reader = ? order by log_partition"
        with self._reader_lock:
            return tuple(offset for (offset,) in self._reader.execute(query, (reader,))) or None

    def start(self) -> Position:
        """The position of the oldest record that is kept."""
        with self._reader_lock:
            return self._column(self._reader, "first_offset")

    def end(self) -> Position:
        """The position after the last durable record."""
        with self._reader_lock:
            return self._column(self._reader, "next_offset")

    def offset_of(self, partition: int, own: int) -> int:
        """`own`: an import moves what is kept."""
        return own

    def read_through_us(self) -> tuple[int, ...]:
        """Largest landed_at of each partition (0: nothing yet), microseconds."""
        with self._reader_lock:
            return self._column(self._reader, "landed_at")

    def heartbeat(self, idle_us: int = SECOND_US) -> int:
        """Writes a heartbeat record to each partition whose newest record is at least `idle_us` old; returns how many.

        A heartbeat carries the log's clock, so that an idle partition does not hold up the tick.
        """
        now_us = self._clock.now_us()
        if min(self._seen_newest) <= now_us - idle_us:
            self._seen_newest = self.read_through_us()
        if min(self._seen_newest) > now_us - idle_us:
            return 0
        with self._writer_lock:
            self._writer.execute("begin immediate")
            try:
                state = self._state()
                records = []
                for partition, (offset, landed_at) in state.items():
                    if landed_at <= now_us - idle_us:
                        records.append(_record(heartbeat_row(partition, offset, now_us), now_us, partition, offset))
                        state[partition] = [offset + 1, now_us]
                self._insert(records, state)
                self._writer.execute("commit")
            except sqlite3.Error as error:
                self._writer.execute("rollback")
                raise HeadraceError(f"event log {self.path} did not take a heartbeat: {error}") from error
        return len(records)

    def trim(self, landed: Position, keep_us: int, max_bytes: int | None = None) -> int:
        """Drops records below `landed` (they are in the lake) that are older than keep_us, or all of them while the file is
        larger than max_bytes; ids older than H are forgotten too. Returns the number of records dropped."""
        now_us = self._clock.now_us()
        oldest_us = now_us - keep_us
        if max_bytes is not None and self.num_bytes() > max_bytes:
            oldest_us = now_us + 1
        dropped = 0
        with self._writer_lock:
            self._writer.execute("begin immediate")
            try:
                for partition, offset in enumerate(landed):
                    dropped += self._writer.execute(
                        "delete from records where log_partition = ? and log_offset < ? and landed_at < ?",
                        (partition, offset, oldest_us),
                    ).rowcount
                    self._writer.execute(
                        "update partitions set first_offset = coalesce((select min(log_offset) from records "
                        "where log_partition = partitions.log_partition), next_offset) where log_partition = ?",
                        (partition,),
                    )
                self._writer.execute("delete from ids where landed_at < ?", (now_us - DUPLICATE_MEMORY_US,))
                self._writer.execute("commit")
            except sqlite3.Error as error:
                self._writer.execute("rollback")
                raise HeadraceError(f"event log {self.path} could not be trimmed: {error}") from error
        return dropped

    def num_bytes(self) -> int:
        """Size of the pages in use, bytes (free pages are reused before the file grows)."""
        with self._reader_lock:
            (pages,), (free,), (size,) = (
                self._reader.execute(f"pragma {name}").fetchone() for name in ("page_count", "freelist_count", "page_size")
            )
        return (pages - free) * size


_NUMBERS = {"event_ts", "landed_at", "log_partition", "log_offset"}
_SELECTED = ", ".join("'log' as landing" if field.name == "landing" else field.name for field in EVENTS_SCHEMA)


_in_stored_order = itemgetter(*((*ROW_FIELDS, "landed_at", "log_partition", "log_offset").index(name) for name in _STORED))


def _record(row: tuple, landed_at: int, partition: int, offset: int) -> tuple:
    return _in_stored_order((*row, landed_at, partition, offset))
