"""The event log in a Kafka topic, through librdkafka: acknowledged means that every in-sync replica has it.

An event is one message: value a JSON object of the event's columns (what the RisingWave table reads), key the user's id,
headers `schema_version` and `event_type`, partition by user as everywhere. `landed_at` is LogAppendTime, made a running maximum
on reading. A position is the topic's offsets plus a shift per partition, 0 unless the lake already held imported events when
the topic was first used. Shift, landed offset and the running maximum there are what the consumer group GROUP commits.

The producer is idempotent, so its own retries store nothing twice; a client's retry after an answer was lost may. An event_id
is answered with its first position while this process remembers it, and readers take the first arrival in any case.
Knows nothing of features.
"""

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from streaming_sql.event_log import Position
from streaming_sql.kafka_address import KafkaAddress
from streaming_sql.kafka_reader import Checkpoints, Reader
from streaming_sql.kafka_topic import DEADLINE_S, delete_below, ready_topic
from streaming_sql.records import (
    ROW_FIELDS,
    DeadLetter,
    dead_letter_row,
    from_message,
    heartbeat_row,
    to_message,
    to_rows,
    to_table,
)
from warehouse.clock import Clock
from warehouse.errors import HeadraceError
from warehouse.events import EVENTS_SCHEMA, NUM_PARTITIONS, partition_of
from warehouse.time_algebra import DUPLICATE_MEMORY_US, SECOND_US

_LOG = logging.getLogger("headrace.kafka")
SCHEMA_VERSION = b"1"
GROUP = "headrace-landed"
_MESSAGES_AT_ONCE = 2_000
_REMEMBERED_IDS = 500_000
_CREATE_TIME = 1
_EVENT_ID, _USER_ID, _EVENT_TYPE = (ROW_FIELDS.index(name) for name in ("event_id", "user_id", "event_type"))


def _client() -> Any:
    try:
        import confluent_kafka
    except ImportError as error:
        raise HeadraceError(
            "an event log in Kafka needs confluent-kafka: pip install -c constraints.txt 'headrace[kafka]'"
        ) from error
    return confluent_kafka


class KafkaLog:
    """An `event_log.Log` in one topic. Any thread may call it; each thread that reads has a consumer of its own."""

    def __init__(self, address: KafkaAddress, num_partitions: int, clock: Clock):
        """Use `open`."""
        self.address, self.num_partitions, self._clock = address, num_partitions, clock
        self._kafka = _client()
        self._settings: Any = {**address.config, "bootstrap.servers": address.brokers, "logger": _LOG}
        self._producer = self._kafka.Producer(
            {
                **self._settings,
                "enable.idempotence": True,
                "acks": "all",
                "linger.ms": 2,
                "message.timeout.ms": int(DEADLINE_S * 1000),
            }
        )
        self._lock = threading.Lock()
        self._ids: OrderedDict[str, tuple[int, tuple[int, int]]] = OrderedDict()
        self._threads = threading.local()
        self._consumers: list[Any] = []
        self._named_readers: dict[str, Any] = {}
        self._admin_consumer = self._consumer(GROUP)
        self._shift, self._landed_offset = [0] * num_partitions, [0] * num_partitions
        self._known_end, self._newest_us = [0] * num_partitions, [0] * num_partitions
        self._checkpoints = [Checkpoints() for _ in range(num_partitions)]

    @classmethod
    def open(
        cls,
        address: KafkaAddress,
        num_partitions: int = NUM_PARTITIONS,
        clock: Clock | None = None,
        start: Position | None = None,
        not_before_us: int = 0,
    ) -> "KafkaLog":
        """Opens the topic, making it if need be. The arguments mean what they mean for `EventLog.open`.

        Raises HeadraceError if no broker answers, or if the topic has another number of partitions or stamps CreateTime.
        """
        log = cls(address, address.num_partitions or num_partitions, clock or Clock())
        if log.num_partitions != num_partitions:
            raise HeadraceError(f"the lake has {num_partitions} log partitions, the Kafka event log {log.num_partitions}")
        with log._told("open the topic"):
            ready_topic(log._settings, address, num_partitions)
            log._take_up(start or (0,) * num_partitions, not_before_us)
        return log

    @contextlib.contextmanager
    def _told(self, what: str) -> Any:
        try:
            yield
        except TimeoutError as error:
            raise HeadraceError(
                f"Kafka at {self.address.brokers} did not {what} {self.address.topic!r} within {DEADLINE_S:.0f} s"
            ) from error
        except self._kafka.KafkaException as error:
            said = error.args[0].str() if error.args and hasattr(error.args[0], "str") else str(error)
            raise HeadraceError(f"Kafka at {self.address.brokers} could not {what} {self.address.topic!r}: {said}") from error

    def _consumer(self, group: str) -> Any:
        consumer = self._kafka.Consumer(
            {
                **self._settings,
                "group.id": group,
                "enable.auto.commit": False,
                "auto.offset.reset": "error",
                "fetch.wait.max.ms": 20,
                "check.crcs": True,
            }
        )
        with self._lock:
            self._consumers.append(consumer)
        return consumer

    def _place(self, partition: int, offset: int | None = None, **more: str) -> Any:
        where = (self.address.topic, partition) if offset is None else (self.address.topic, partition, offset)
        return self._kafka.TopicPartition(*where, **more)

    def _take_up(self, start: Position, not_before_us: int) -> None:
        if len(start) != self.num_partitions:
            raise HeadraceError(f"start must have {self.num_partitions} offsets, one per partition, got {start}")
        committed = self._admin_consumer.committed([self._place(p) for p in range(self.num_partitions)], timeout=DEADLINE_S)
        fresh = []
        for place in committed:
            partition = place.partition
            low, high = self._watermarks(partition)
            self._known_end[partition] = high
            if place.offset >= 0 and place.metadata:
                kept = orjson.loads(place.metadata)
                self._shift[partition], self._landed_offset[partition] = kept["shift"], place.offset
                self._newest_us[partition] = kept["landed_at"]
                self._checkpoints[partition].add(place.offset, kept["landed_at"])
                if low > place.offset:
                    raise HeadraceError(
                        f"Kafka topic {self.address.topic!r} dropped offsets {place.offset} to {low - 1} of partition "
                        f"{partition} before they landed: its retention is too short; set retention.ms=-1 and let Headrace trim"
                    )
            else:
                self._shift[partition], self._landed_offset[partition] = start[partition] - low, low
                self._newest_us[partition] = not_before_us
                self._checkpoints[partition].add(low, not_before_us)
                fresh.append(partition)
        if fresh:
            self._commit_landed({partition: not_before_us for partition in fresh})

    def _commit_landed(self, landed_us: Mapping[int, int]) -> None:
        places = [
            self._place(p, self._landed_offset[p], metadata=orjson.dumps({"shift": self._shift[p], "landed_at": us}).decode())
            for p, us in landed_us.items()
        ]
        for place in self._admin_consumer.commit(offsets=places, asynchronous=False):
            if place.error is not None:
                raise self._kafka.KafkaException(place.error)

    def _watermarks(self, partition: int) -> tuple[int, int]:
        found = self._admin_consumer.get_watermark_offsets(self._place(partition), timeout=DEADLINE_S)
        if found is None:
            raise HeadraceError(f"Kafka at {self.address.brokers} did not answer within {DEADLINE_S:.0f} s")
        return found

    def close(self) -> None:
        """Closes producer and consumers; nothing is lost by not calling it."""
        self._producer.flush(DEADLINE_S)
        with self._lock:
            consumers, self._consumers = self._consumers, []
        for consumer in consumers:
            consumer.close()

    def append(self, events: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
        """(partition, offset) of each event, once all in-sync replicas have them. Raises HeadraceError naming the first bad
        event, and then stores none; or when Kafka did not take all of them, and then some may be there: send them again."""
        return self._append_rows(to_rows(events))

    def append_dead_letters(self, letters: Sequence[DeadLetter]) -> None:
        """Keeps what is no event, with the reason, until the lander buries it."""
        self._append_rows([dead_letter_row(letter, self._clock.now_us()) for letter in letters])

    def _append_rows(self, rows: list[tuple]) -> list[tuple[int, int]]:
        now_us = self._clock.now_us()
        ids = [row[_EVENT_ID] for row in rows]
        with self._lock:
            since_us = now_us - DUPLICATE_MEMORY_US
            known = {one: self._ids[one][1] for one in ids if one in self._ids and self._ids[one][0] >= since_us}
        new = {row[_EVENT_ID]: row for row in reversed(rows) if row[_EVENT_ID] not in known}
        ordered = [new.pop(one) for one in ids if one in new]
        places = self._produce([(partition_of(row[_USER_ID], self.num_partitions), row) for row in ordered], now_us)
        stored = {row[_EVENT_ID]: place for row, place in zip(ordered, places, strict=True)}
        with self._lock:
            for one, place in stored.items():
                self._ids[one] = (now_us, place)
            while len(self._ids) > _REMEMBERED_IDS:
                self._ids.popitem(last=False)
        known |= stored
        return [known[one] for one in ids]

    def _produce(self, rows: Sequence[tuple[int, tuple]], now_us: int) -> list[tuple[int, int]]:
        places: list[tuple[int, int] | None] = [None] * len(rows)
        errors: list[Any] = []

        def delivered(index: int) -> Callable[[Any, Any], None]:
            def note(error: Any, message: Any) -> None:
                if error is not None:
                    errors.append(error)
                    return
                partition = message.partition()
                places[index] = (partition, message.offset() + self._shift[partition])
                with self._lock:
                    self._known_end[partition] = max(self._known_end[partition], message.offset() + 1)
                    self._newest_us[partition] = max(self._newest_us[partition], now_us)

            return note

        deadline = time.monotonic() + DEADLINE_S + 5
        for index, (partition, row) in enumerate(rows):
            while True:
                try:
                    self._producer.produce(
                        self.address.topic,
                        value=to_message(row),
                        key=(row[_USER_ID] or "").encode(),
                        partition=partition,
                        timestamp=now_us // 1000,
                        headers={"schema_version": SCHEMA_VERSION, "event_type": row[_EVENT_TYPE].encode()},
                        on_delivery=delivered(index),
                    )
                    break
                except BufferError:
                    self._producer.poll(0.05)
                    if time.monotonic() > deadline:
                        raise HeadraceError("the queue to Kafka has been full for 30 s; the brokers do not keep up") from None
        while any(place is None for place in places) and not errors:
            if time.monotonic() > deadline:
                raise HeadraceError(f"Kafka at {self.address.brokers} did not acknowledge within {DEADLINE_S:.0f} s")
            self._producer.poll(0.02)
        if errors:
            raise HeadraceError(f"Kafka at {self.address.brokers} did not take the events: {errors[0].str()}")
        return [place for place in places if place is not None]

    def read(self, position: Position, limit: int) -> pa.Table:
        """The next at most `limit` records at or after `position`, by (landed_at, log_partition, log_offset), no gaps.

        What this process has appended, or `end` has told it of, is there. Raises HeadraceError if retention has dropped records
        at `position` (read them from the lake), ValueError if limit is not positive.
        """
        if limit <= 0:
            raise ValueError(f"limit must be positive, got {limit}")
        if len(position) != self.num_partitions:
            raise ValueError(f"position must have {self.num_partitions} offsets, got {position}")
        offsets = [offset - shift for offset, shift in zip(position, self._shift, strict=True)]
        with self._told("read"):
            reader = getattr(self._threads, "reader", None)
            if reader is None:
                reader = self._threads.reader = Reader(self._consumer("headrace-read"), self.num_partitions)
            self._fetch(reader, offsets, limit)
        buffered = [row for partition, offset in enumerate(offsets) for row in reader.rows(partition, offset, limit)]
        rows = sorted(buffered, key=_by_landing)[:limit]
        for partition, (end, landed_us) in {row[_PARTITION]: (row[_OFFSET] + 1, row[_LANDED_AT]) for row in rows}.items():
            self._checkpoints[partition].add(end - self._shift[partition], landed_us)
            self._newest_us[partition] = max(self._newest_us[partition], landed_us)
        return to_table(rows)

    def _fetch(self, reader: Reader, offsets: Sequence[int], limit: int) -> None:
        """Fills the reader's buffers from `offsets` on: `limit` records of each partition, or all there are."""
        moved = [p for p in range(self.num_partitions) if not reader.holds(p, offsets[p])]
        if moved:
            for partition in moved:
                reader.start(partition, *self._checkpoint(partition, offsets[partition]))
            self._assign(reader)
        wanted = [min(offset + limit, end) for offset, end in zip(offsets, self._known_end, strict=True)]
        deadline, wait_s = time.monotonic() + DEADLINE_S, 0.0
        while True:
            messages = reader.consumer.consume(_MESSAGES_AT_ONCE, wait_s)
            self._sort_in(reader, messages)
            if all(reader.end(p) >= wanted[p] for p in range(self.num_partitions)):
                return
            if time.monotonic() > deadline:
                raise HeadraceError(f"Kafka at {self.address.brokers} did not send what it has within {DEADLINE_S:.0f} s")
            wait_s = 0.0 if messages else 0.005

    def _assign(self, reader: Reader) -> None:
        reader.consumer.assign([self._place(p, reader.end(p)) for p in range(self.num_partitions)])

    def _sort_in(self, reader: Reader, messages: Sequence[Any]) -> None:
        for message in messages:
            error, partition = message.error(), message.partition()
            if error is None:
                if message.offset() == reader.end(partition):
                    reader.add(partition, self._row(reader, message))
                elif message.offset() > reader.end(partition):
                    raise self._dropped(partition, reader.end(partition))
            elif error.code() in (self._kafka.KafkaError._AUTO_OFFSET_RESET, self._kafka.KafkaError.OFFSET_OUT_OF_RANGE):
                raise self._dropped(partition, reader.end(partition))
            else:
                raise self._kafka.KafkaException(error)

    def _row(self, reader: Reader, message: Any) -> tuple:
        kind, stamp_ms = message.timestamp()
        if kind == _CREATE_TIME and not self.address.trusts_create_time:
            raise HeadraceError(
                f"Kafka topic {self.address.topic!r} holds a record that its producer stamped (partition "
                f"{message.partition()}, offset {message.offset()}); set message.timestamp.type=LogAppendTime"
            )
        partition = message.partition()
        landed_at = max(reader.landed_at[partition], stamp_ms * 1000)
        return from_message(message.value(), landed_at, partition, message.offset() + self._shift[partition])

    def _checkpoint(self, partition: int, offset: int) -> tuple[int, int]:
        """The nearest place at or before `offset` where the running maximum is known: (offset, its maximum before)."""
        found = self._checkpoints[partition].before(offset)
        if found is None:
            low, _ = self._watermarks(partition)
            if offset < low:
                raise self._dropped(partition, offset)
            # all from `low` to the first checkpoint is in the lake, whose landed_at counts; here the maximum starts anew
            return low, 0
        return found

    def _dropped(self, partition: int, offset: int) -> HeadraceError:
        low, _ = self._watermarks(partition)
        shift = self._shift[partition]
        return HeadraceError(
            f"Kafka topic {self.address.topic!r} keeps records of partition {partition} from {low + shift} on, asked for "
            f"{offset + shift}: read the lake first"
        )

    def start(self) -> Position:
        """The position of the oldest record that is kept."""
        with self._told("tell the ends of"):
            return tuple(self._watermarks(p)[0] + self._shift[p] for p in range(self.num_partitions))

    def end(self) -> Position:
        """The position after the last record that all in-sync replicas have."""
        with self._told("tell the ends of"):
            for partition in range(self.num_partitions):
                high = self._watermarks(partition)[1]
                with self._lock:
                    self._known_end[partition] = max(self._known_end[partition], high)
        return tuple(end + shift for end, shift in zip(self._known_end, self._shift, strict=True))

    def offset_of(self, partition: int, own: int) -> int:
        """The offset here of what the topic has at `own`."""
        return own + self._shift[partition]

    def read_through_us(self) -> tuple[int, ...]:
        """Largest landed_at of each partition (0: nothing yet), microseconds."""
        end = self.end()
        last = tuple(max(offset - 1, first) for offset, first in zip(end, self.start(), strict=True))
        if any(offset < stop for offset, stop in zip(last, end, strict=True)):
            self.read(last, self.num_partitions)
        return tuple(self._newest_us)

    def heartbeat(self, idle_us: int = SECOND_US) -> int:
        """Writes a heartbeat to each partition that neither wrote nor was read from for `idle_us`; returns how many."""
        now_us = self._clock.now_us()
        idle = [p for p in range(self.num_partitions) if self._newest_us[p] <= now_us - idle_us]
        self._produce([(p, heartbeat_row(p, now_us, now_us)) for p in idle], now_us)
        return len(idle)

    def landed(self) -> Position:
        """What `mark_landed` was last told, by any process."""
        with self._told("tell the landed position of"):
            for place in self._admin_consumer.committed(
                [self._place(p) for p in range(self.num_partitions)], timeout=DEADLINE_S
            ):
                self._landed_offset[place.partition] = place.offset
        return tuple(offset + shift for offset, shift in zip(self._landed_offset, self._shift, strict=True))

    def mark_landed(self, landed: Position) -> None:
        """Remembers that records below `landed` are in the lake; `trim` may drop them."""
        moved = {}
        for partition, position in enumerate(landed):
            offset = min(position - self._shift[partition], self._known_end[partition])
            if offset > self._landed_offset[partition]:
                moved[partition] = self._landed_before(partition, offset)
                self._landed_offset[partition] = offset
                self._checkpoints[partition].add(offset, moved[partition])
        if moved:
            with self._told("keep the landed position of"):
                self._commit_landed(moved)

    def _landed_before(self, partition: int, offset: int) -> int:
        """The largest landed_at of the partition before `offset`; reads what this process has not read yet."""
        at, landed_us = self._checkpoint(partition, offset)
        position = list(self.end())
        while at < offset:
            position[partition] = at + self._shift[partition]
            records = self.read(tuple(position), min(offset - at, 10_000))
            own = records.filter(pc.equal(records["log_partition"], partition))
            landed_us = max(landed_us, *own["landed_at"].cast(pa.int64()).to_pylist())
            at += own.num_rows
        return landed_us

    def renumber(self, landed: Position, not_before_us: int) -> None:
        """Shifts the positions of what has not landed to `landed` on, after an import took theirs in the lake. Not for a log
        that others are reading."""
        self.landed()
        for partition, position in enumerate(landed):
            offset = self._landed_offset[partition]
            self._shift[partition] = position - offset
            self._newest_us[partition] = max(self._newest_us[partition], not_before_us)
            self._checkpoints[partition] = Checkpoints()
            self._checkpoints[partition].add(offset, not_before_us)
        self._threads = threading.local()
        with self._lock:
            self._ids.clear()
        with self._told("keep the landed position of"):
            self._commit_landed(dict.fromkeys(range(self.num_partitions), not_before_us))

    def ids(self, partition: int, start: int, end: int) -> dict[int, str]:
        """offset → event_id of the records of one partition with start <= offset < end that the log still holds."""
        whole = list(self.end())
        first = max(start, self.start()[partition])
        end = min(end, whole[partition])
        found: dict[int, str] = {}
        while first < end:
            whole[partition] = first
            records = self.read(tuple(whole), min(end - first, 10_000))
            for row in records.select(["event_id", "log_partition", "log_offset"]).to_pylist():
                if row["log_partition"] == partition and row["log_offset"] < end:
                    found[row["log_offset"]] = row["event_id"]
                    first = max(first, row["log_offset"] + 1)
        return found

    def commit(self, reader: str, position: Position) -> None:
        """Keeps how far a named reader has come, as offsets of the consumer group headrace-<reader>."""
        consumer = self._named(reader)
        places = [self._place(p, offset - self._shift[p]) for p, offset in enumerate(position)]
        with self._told("keep a reader's position of"):
            consumer.commit(offsets=places, asynchronous=False)

    def committed(self, reader: str) -> Position | None:
        """Where a named reader said it is; None if it never did."""
        with self._told("tell a reader's position of"):
            places = self._named(reader).committed([self._place(p) for p in range(self.num_partitions)], timeout=DEADLINE_S)
        if any(place.offset < 0 for place in places):
            return None
        return tuple(place.offset + self._shift[place.partition] for place in places)

    def _named(self, reader: str) -> Any:
        if reader not in self._named_readers:
            self._named_readers[reader] = self._consumer(f"headrace-{reader}")
        return self._named_readers[reader]

    def trim(self, landed: Position, keep_us: int, max_bytes: int | None = None) -> int:
        """Deletes records below `landed` that are older than keep_us, as far as this process knows their age; returns how
        many. Bytes are the brokers' matter (retention.bytes): max_bytes is not looked at."""
        oldest_us, places, dropped = self._clock.now_us() - keep_us, [], 0
        for partition, position in enumerate(landed):
            found = self._checkpoints[partition].oldest(oldest_us, position - self._shift[partition])
            low, _ = self._watermarks(partition)
            if found is not None and found > low:
                places.append(self._place(partition, found))
                dropped += found - low
        if not places:
            return 0
        with self._told("trim"):
            delete_below(self._settings, places)
        return dropped

    def num_bytes(self) -> int | None:
        """None: only the brokers know."""
        return None


_NAMES = EVENTS_SCHEMA.names
_PARTITION, _OFFSET, _LANDED_AT = (_NAMES.index(name) for name in ("log_partition", "log_offset", "landed_at"))


def _by_landing(row: tuple) -> tuple[int, int, int]:
    return row[_LANDED_AT], row[_PARTITION], row[_OFFSET]
