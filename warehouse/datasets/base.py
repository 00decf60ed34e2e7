"""What an imported data set is: events in order of arrival, notes and users, in the column shapes of the lake.

Knows nothing of where a data set comes from, nor of the lake that it goes to.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from warehouse.events import EVENTS_SCHEMA, TIMESTAMP

SET_BY_LANDING = ("log_partition", "log_offset", "landing")
DATASET_EVENTS_SCHEMA = pa.schema([field for field in EVENTS_SCHEMA if field.name not in SET_BY_LANDING])

NOTES_SCHEMA = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("author_id", pa.string()),
        pa.field("topics", pa.list_(pa.string())),
        pa.field("note_type", pa.string()),
        pa.field("duration_ms", pa.int64()),
        pa.field("created_at", TIMESTAMP),
        pa.field("geohash", pa.string()),
    ]
)

USERS_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("created_at", TIMESTAMP),
        pa.field("attributes", pa.string()),
        pa.field("history_note_ids", pa.list_(pa.string())),
        pa.field("history_liked_note_ids", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class Dataset:
    """One imported history.

    events: DATASET_EVENTS_SCHEMA, in order of `landed_at`, which the adapter declares; an `event_id` may arrive more than once.
    notes, users: NOTES_SCHEMA and USERS_SCHEMA, one row per id.
    description: one sentence for the person who runs the job: what it is, its licence, how landing times were declared.
    Raises ValueError when a table has another schema or the events are out of order.
    """

    name: str
    events: pa.Table
    notes: pa.Table
    users: pa.Table
    description: str

    def __post_init__(self) -> None:
        expected = {"events": DATASET_EVENTS_SCHEMA, "notes": NOTES_SCHEMA, "users": USERS_SCHEMA}
        for part, schema in expected.items():
            arrived = getattr(self, part).schema
            if not arrived.equals(schema):
                raise ValueError(f"data set {self.name}: {part} must have the schema\n{schema}\ngot\n{arrived}")
        landed_at_us = self.events["landed_at"].cast(pa.int64()).to_numpy()
        if np.any(np.diff(landed_at_us) < 0):
            raise ValueError(f"data set {self.name}: events must be sorted by landed_at")
