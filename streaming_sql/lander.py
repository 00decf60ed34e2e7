"""Log → lake: appends records to `lake.events` by size or age, exactly once, then lets the log drop what it holds twice.

Knows nothing of features; runs beside the feed with a position of its own, the one in the lake.
"""

import json
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.expressions import And, EqualTo, In

from streaming_sql.arrivals import reasons
from streaming_sql.event_log import EventLog, Position
from warehouse.clock import Clock
from warehouse.events import HEARTBEAT
from warehouse.lake import Lake
from warehouse.landing import DEAD_LETTERS, DEAD_LETTERS_SCHEMA, create_tables, land_records, landed_position
from warehouse.time_algebra import DAY_US, MINUTE_US

SOURCE = "log"


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

    def __init__(self, lake: Lake, log: EventLog, clock: Clock, settings: LanderSettings | None = None):
        self._lake, self._log, self._clock = lake, log, clock
        self._settings = settings or LanderSettings()
        create_tables(lake)
        self.position: Position = landed_position(lake)
        log.mark_landed(self.position)

    def step(self, flush: bool = False) -> int:
        """Lands one batch if it is due (or `flush`); returns the number of records taken from the log, 0 if none was due."""
        if not flush and sum(self._log.end()) - sum(self.position) < self._settings.rows:
            oldest = self._log.read(self.position, 1_000)
            if not self._is_due(oldest):
                return 0
        records = self._log.read(self.position, self._settings.rows)
        if records.num_rows == 0:
            return 0
        position = list(self.position)
        for partition, offset in zip(records["log_partition"].to_pylist(), records["log_offset"].to_pylist(), strict=True):
            position[partition] = offset + 1
        self._bury(records)
        land_records(self._lake, _worth_landing(records), tuple(position))
        self.position = landed_position(self._lake)
        self._log.mark_landed(self.position)
        self._log.trim(self.position, self._settings.keep_us, self._settings.keep_bytes)
        return records.num_rows

    def flush(self) -> int:
        """Lands everything that is in the log now."""
        total = 0
        while sum(self.position) < sum(self._log.end()):
            total += self.step(flush=True)
        return total

    def _is_due(self, oldest: pa.Table) -> bool:
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


def _places(records: pa.Table) -> list[dict]:
    return records.select(["log_partition", "log_offset"]).to_pylist()


def _payloads(records: pa.Table) -> list[str]:
    return [json.dumps(row, default=str, ensure_ascii=False) for row in records.to_pylist()]


def _worth_landing(records: pa.Table) -> pa.Table:
    """Less dead letters, and of heartbeats only the last of each partition: it carries the clock of all before it."""
    last = records.group_by("log_partition").aggregate([("log_offset", "max")])
    ends = dict(zip(last["log_partition"].to_pylist(), last["log_offset_max"].to_pylist(), strict=True))
    is_last = pa.array([ends[place["log_partition"]] == place["log_offset"] for place in _places(records)], pa.bool_())
    is_event = pc.not_equal(records["event_type"], HEARTBEAT)
    return records.filter(pc.and_(pc.is_null(reasons(records)), pc.or_(is_event, is_last)))
