"""One thread's reading of a Kafka topic: records fetched ahead, and where the running maximum of landed_at is known.

Offsets here are the topic's own.
"""

import bisect
from typing import Any

from warehouse.events import EVENTS_SCHEMA

_LANDED_AT = EVENTS_SCHEMA.get_field_index("landed_at")
_MOST_CHECKPOINTS = 4096


class Reader:
    """A consumer and, per partition, the rows (tuples of EVENTS_SCHEMA) that it fetched and nobody has moved past."""

    def __init__(self, consumer: Any, num_partitions: int):
        self.consumer = consumer
        self.landed_at = [0] * num_partitions
        """The running maximum at the end of each buffer, microseconds."""
        self._first: list[int | None] = [None] * num_partitions
        self._rows: list[list[tuple]] = [[] for _ in range(num_partitions)]

    def holds(self, partition: int, offset: int) -> bool:
        """Whether the buffer continues to, or reaches past, this offset."""
        first = self._first[partition]
        return first is not None and first <= offset <= self.end(partition)

    def start(self, partition: int, offset: int, landed_us: int) -> None:
        """An empty buffer at `offset`, before which the largest landed_at is landed_us."""
        self._first[partition], self._rows[partition], self.landed_at[partition] = offset, [], landed_us

    def end(self, partition: int) -> int:
        """The offset after the buffer."""
        return (self._first[partition] or 0) + len(self._rows[partition])

    def add(self, partition: int, row: tuple) -> None:
        self._rows[partition].append(row)
        self.landed_at[partition] = row[_LANDED_AT]

    def rows(self, partition: int, offset: int, limit: int) -> list[tuple]:
        """At most `limit` rows from `offset` on; drops those before it."""
        first = self._first[partition]
        assert first is not None
        if offset > first:
            del self._rows[partition][: offset - first]
            self._first[partition] = offset
        return self._rows[partition][:limit]


class Checkpoints:
    """Of one partition: offsets, each with the largest landed_at before it."""

    def __init__(self) -> None:
        self._offsets: list[int] = []
        self._landed_us: list[int] = []

    def add(self, offset: int, landed_us: int) -> None:
        place = bisect.bisect_left(self._offsets, offset)
        if place < len(self._offsets) and self._offsets[place] == offset:
            return
        self._offsets.insert(place, offset)
        self._landed_us.insert(place, landed_us)
        if len(self._offsets) > _MOST_CHECKPOINTS:
            del self._offsets[1:-1:2], self._landed_us[1:-1:2]

    def before(self, offset: int) -> tuple[int, int] | None:
        """The last at or before `offset`; None if there is none."""
        place = bisect.bisect_right(self._offsets, offset) - 1
        return (self._offsets[place], self._landed_us[place]) if place >= 0 else None

    def oldest(self, landed_us: int, offset: int) -> int | None:
        """The largest known offset, at most `offset`, that has only records landed before landed_us before it."""
        place = min(bisect.bisect_left(self._landed_us, landed_us), bisect.bisect_right(self._offsets, offset)) - 1
        return self._offsets[place] if place >= 0 else None
