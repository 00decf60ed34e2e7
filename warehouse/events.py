"""What an event is: the Arrow schema of `lake.events`, its log partition, and the rules a raw event must pass."""

import zlib

import pyarrow as pa

TIMESTAMP = pa.timestamp("us", tz="UTC")

EVENTS_SCHEMA = pa.schema(
    [
        pa.field("event_id", pa.string(), nullable=False),
        pa.field("event_type", pa.string(), nullable=False),
        pa.field("user_id", pa.string()),
        pa.field("note_id", pa.string()),
        pa.field("author_id", pa.string()),
        pa.field("surface", pa.string()),
        pa.field("request_id", pa.string()),
        pa.field("impression_id", pa.string()),
        pa.field("event_ts", TIMESTAMP, nullable=False),
        pa.field("landed_at", TIMESTAMP, nullable=False),
        pa.field("log_partition", pa.int32(), nullable=False),
        pa.field("log_offset", pa.int64(), nullable=False),
        pa.field("landing", pa.string(), nullable=False),
        pa.field("retracts", pa.string()),
        pa.field("properties", pa.string()),
    ]
)

NUM_PARTITIONS = 2
HEARTBEAT = "heartbeat"
DEAD_LETTER = "dead_letter"
"""The type of a record of the log that is no event: `properties` holds its `reason` and `payload`. Never in lake.events."""
RETRACTION = "retraction"
"""The type of an event that takes another one back: `retracts` names it, and no other type has `retracts`."""
EVENT_TYPES = ("view", "click", "long_view", "like", "comment", "share", "follow", "hide", "watch")


def partition_of(user_id: str | None, num_partitions: int = NUM_PARTITIONS) -> int:
    """The log partition of a user's events: CRC-32 of the UTF-8 id, so every process and every run agrees."""
    return zlib.crc32((user_id or "").encode()) % num_partitions
