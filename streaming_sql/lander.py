"""Log → lake: appends records to `lake.events` by size or age, exactly once, then lets the log drop what it holds twice.

Knows nothing of features; runs beside the feed with a position of its own, the one in the lake.
"""

import json
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.expressions import And, EqualTo, GreaterThanOrEqual, In, LessThan

from streaming_sql.arrivals import reasons
from streaming_sql.event_log import Log, Position
from warehouse.clock import Clock
from warehouse.errors import HeadraceError
from warehouse.events import DEAD_LETTER, EVENTS_SCHEMA, HEARTBEAT
from warehouse.lake import Lake
from warehouse.landing import DEAD_LETTERS, DEAD_LETTERS_SCHEMA, EVENTS, create_tables, land_records, landed_position
from warehouse.time_algebra import DAY_US, MINUTE_US

SOURCE = "log"
_PIECE = 500
"""Records read at once."""


@dataclass(frozen=True)
class LanderSettings:
    """When to commit, and how much of the log to keep once it is in the lake."""

    rows: int = 20_000
    """Commit at this many records,"""
    age_us: int = MINUTE_US
    """or when the oldest has waited this long."""
    heartbeats_age_us: int = 10 * MINUTE_US
    """Heartbeats alone wait longer: an idle night must not write a thousand files."""
    keep_us: int = DAY_US
    keep_bytes: int = 2 * 1024**3


class Lander:
    """Lands the log's records. One at a time is enough; a second one adds nothing twice."""

    def __init__(self, lake: Lake, log: Log, clock: Clock, settings: LanderSettings | None = None):
        self._lake, self._log, self._clock = lake, log, clock
        self._settings = settings or LanderSettings()
        create_tables(lake)
        self.position: Position = log.landed()
        if self._conflict(landed_position(lake)):
            log.renumber(landed_position(lake), newest_landed_us(lake))
            self.position = log.landed()
        self._follow_lake()

    def step(self, flush: bool = False) -> int:
        """Lands one batch if it is due (or `flush`); returns the number of records taken from the log, 0 if none was due."""
        if not flush and sum(self._log.end()) - sum(self.position) < self._settings.rows and not self._is_due():
            return 0
        self._follow_lake()
        records = self._next(self._settings.rows)
        if records.num_rows == 0:
            return 0
        position = _after(self.position, records)
        self._bury(records)
        worth = _worth_landing(records)
        if land_records(self._lake, worth, position) == worth.num_rows:
            self.position = position
            self._log.mark_landed(self.position)
        self._follow_lake()
        self._log.trim(self.position, self._settings.keep_us, self._settings.keep_bytes)
        return records.num_rows

    def _next(self, limit: int) -> pa.Table:
        """The next at most `limit` records, read in small pieces: the log's reader and the interpreter are held for the length
        of one, and the events that come meanwhile wait."""
        parts, at, left = [EVENTS_SCHEMA.empty_table()], self.position, limit
        while left > 0:
            piece = self._log.read(at, min(left, _PIECE))
            parts.append(piece)
            left -= piece.num_rows
            if piece.num_rows < _PIECE:
                break
            at = _after(at, piece)
        return pa.concat_tables(parts)

    def _follow_lake(self) -> None:
        """Moves to the lake's position, which another lander may have moved, or a crash left ahead of what the log was told.

        Raises HeadraceError if an import moved it: nothing is marked or trimmed then, so the log still holds its records, and
        the next start gives them new offsets.
        """
        landed = landed_position(self._lake)
        if landed == self.position:
            return
        if conflict := self._conflict(landed):
            raise HeadraceError(f"{conflict}; nothing is lost: start again, and import only while nothing runs")
        self.position = landed
        self._log.mark_landed(landed)

    def _conflict(self, landed: Position) -> str | None:
        """What shows that the lake's rows between our position and `landed` are not the log's own; None if they are."""
        if any(there > own for there, own in zip(landed, self._log.end(), strict=True)):
            return f"an import moved the lake to {list(landed)}, past the event log"
        for partition, (start, end) in enumerate(zip(self.position, landed, strict=True)):
            if start == end:
                continue
            ids = self._log.ids(partition, start, end)
            between = And(
                EqualTo("log_partition", partition), GreaterThanOrEqual("log_offset", start), LessThan("log_offset", end)
            )
            for row in self._lake.scan(EVENTS, between, ("event_id", "log_offset")).to_pylist():
                if ids.get(row["log_offset"]) != row["event_id"]:
                    return (
                        f"record {row['log_offset']} of log partition {partition} has not landed, and an import put "
                        f"{row['event_id']} in its place"
                    )
        return None

    def flush(self) -> int:
        """Lands everything that is in the log now."""
        total = 0
        while sum(self.position) < sum(self._log.end()):
            total += self.step(flush=True)
        return total

    def _is_due(self) -> bool:
        oldest = self._log.read(self.position, _PIECE)
        if oldest.num_rows == 0:
            return False
        now_us = self._clock.now_us()
        landed_at = oldest["landed_at"].cast(pa.int64())
        events = landed_at.filter(pc.not_equal(oldest["event_type"], HEARTBEAT))
        if len(events) and events[0].as_py() <= now_us - self._settings.age_us:
            return True
        return landed_at[0].as_py() <= now_us - self._settings.heartbeats_age_us

    def _bury(self, records: pa.Table) -> None:
        """Dead letters first, so that a crash before the position moves repeats nothing: those already there are skipped."""
        why = reasons(records)
        dead = records.filter(pc.is_valid(why))
        if dead.num_rows == 0:
            return
        positions = [f"{place['log_partition']}:{place['log_offset']}" for place in _places(dead)]
        already = And(EqualTo("source", SOURCE), In("position", positions))
        there = set(self._lake.scan(DEAD_LETTERS, already, ("position",))["position"].to_pylist())
        letters = pa.table(
            {
                "source": pa.array([SOURCE] * dead.num_rows, pa.string()),
                "position": pa.array(positions, pa.string()),
                "reason": why.filter(pc.is_valid(why)),
                "payload": pa.array(_payloads(dead), pa.string()),
                "landed_at": dead["landed_at"],
            }
        ).cast(DEAD_LETTERS_SCHEMA)
        fresh = letters.filter(pa.array([position not in there for position in positions], pa.bool_()))
        if fresh.num_rows:
            self._lake.append(DEAD_LETTERS, fresh)


def newest_landed_us(lake: Lake) -> int:
    """The largest landed_at in the lake, microseconds; 0 while it is empty."""
    if lake.table(EVENTS).current_snapshot() is None:
        return 0
    with lake.duckdb() as connection:
        return connection.execute("select coalesce(max(epoch_us(landed_at)), 0) from lake.events").fetchall()[0][0]


def _after(position: Position, records: pa.Table) -> Position:
    """The position behind the records, at `position` or later."""
    reached = list(position)
    last = records.group_by("log_partition").aggregate([("log_offset", "max")])
    for partition, offset in zip(last["log_partition"].to_pylist(), last["log_offset_max"].to_pylist(), strict=True):
        reached[partition] = max(reached[partition], offset + 1)
    return tuple(reached)


def _places(records: pa.Table) -> list[dict]:
    return records.select(["log_partition", "log_offset"]).to_pylist()


def _payloads(records: pa.Table) -> list[str]:
    return [
        json.loads(row["properties"])["payload"]
        if row["event_type"] == DEAD_LETTER
        else json.dumps(row, default=str, ensure_ascii=False)
        for row in records.to_pylist()
    ]


def _worth_landing(records: pa.Table) -> pa.Table:
    """Less dead letters, and of heartbeats only the last of each partition: it carries the clock of all before it."""
    ends = pa.array(_after((0,) * (pc.max(records["log_partition"]).as_py() + 1), records), pa.int64())
    is_last = pc.equal(pc.add(records["log_offset"], 1), ends.take(records["log_partition"]))
    is_event = pc.not_equal(records["event_type"], HEARTBEAT)
    return records.filter(pc.and_(pc.is_null(reasons(records)), pc.or_(is_event, is_last)))
