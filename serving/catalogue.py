"""The notes there are: the dimension `lake.notes` as columns, one row number per note.

Request-time features of a note come from here and nowhere else. Knows nothing of users or engagement.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import types

from serving.nearby import Places
from warehouse.compiled import compiled, only_read
from warehouse.lake import Lake
from warehouse.time_algebra import MINUTE_US

UNKNOWN_US = np.iinfo(np.int64).min
"""Stands for "created_at is null"."""

REQUEST_FEATURES = ("note_duration_ms", "note_age_min")
"""Numeric request-time features of a note; note_type and note_topic are words and are not handed to models."""


@dataclass(frozen=True)
class Catalogue:
    """N notes, in the order of note_id. `row_of` maps a note_id to its row; topic_code_N is -1 for a note without a topic."""

    note_ids: list[str]
    author_ids: list[str | None]
    topics: list[str | None]
    note_types: list[str | None]
    duration_ms_N: np.ndarray
    created_us_N: np.ndarray
    first_seen_us_N: np.ndarray
    row_of: dict[str, int]
    rows_of_author: dict[str, np.ndarray]
    author_row_of: dict[str, int]
    """An author's place in `rows_of_author`."""
    author_row_N: np.ndarray
    """int64: that of each note's author, -1 for none."""
    topic_codes: dict[str, int]
    topic_code_N: np.ndarray
    places: Places
    notes: pa.Table
    """The dimension itself, in the same order."""

    @classmethod
    def from_lake(cls, lake: Lake) -> "Catalogue":
        """Reads `lake.notes`, and from `lake.events` when each note was first seen by anyone."""
        notes = lake.scan("lake.notes").sort_by("note_id")
        with lake.duckdb() as connection:
            seen = connection.execute(
                """
                select note_id, min(epoch_us(event_ts)) as first_seen_us
                from lake.events
                where note_id is not null and event_type <> 'retraction'
                group by note_id
                """
            ).to_arrow_table()
        return cls.from_tables(notes, dict(zip(seen["note_id"].to_pylist(), seen["first_seen_us"].to_pylist(), strict=True)))

    @classmethod
    def from_tables(cls, notes: pa.Table, first_seen_us: dict[str, int]) -> "Catalogue":
        """notes: columns of `lake.notes`. first_seen_us: note_id -> microseconds of its first event."""
        # one text for a note wherever it is named, in readers' histories and models: in memory once, and found by its address
        note_ids = list(map(sys.intern, notes["note_id"].to_pylist()))
        author_ids = notes["author_id"].to_pylist()
        created = pc.fill_null(notes["created_at"].cast(pa.int64()), UNKNOWN_US).to_numpy()
        rows_of_author: dict[str, list[int]] = {}
        for row, author_id in enumerate(author_ids):
            if author_id is not None:
                rows_of_author.setdefault(author_id, []).append(row)
        author_row_of = {author_id: place for place, author_id in enumerate(rows_of_author)}
        topics = [of_note[0] if of_note else None for of_note in notes["topics"].to_pylist()]
        topic_codes = {topic: code for code, topic in enumerate(dict.fromkeys(topic for topic in topics if topic is not None))}
        return cls(
            note_ids=note_ids,
            author_ids=author_ids,
            topics=topics,
            note_types=notes["note_type"].to_pylist(),
            duration_ms_N=pc.fill_null(notes["duration_ms"].cast(pa.float64()), float("nan")).to_numpy(),
            created_us_N=created,
            first_seen_us_N=np.array([first_seen_us.get(note_id, UNKNOWN_US) for note_id in note_ids], dtype=np.int64),
            row_of={note_id: row for row, note_id in enumerate(note_ids)},
            rows_of_author={author_id: np.array(rows) for author_id, rows in rows_of_author.items()},
            author_row_of=author_row_of,
            author_row_N=np.array([author_row_of.get(author_id, -1) for author_id in author_ids], dtype=np.int64),
            topic_codes=topic_codes,
            topic_code_N=np.array([-1 if topic is None else topic_codes[topic] for topic in topics], dtype=np.int64),
            places=Places(notes["geohash"].to_pylist() if "geohash" in notes.column_names else [None] * len(note_ids)),
            notes=notes,
        )

    def __len__(self) -> int:
        return len(self.note_ids)

    def author_of(self, note_id: str) -> str | None:
        row = self.row_of.get(note_id)
        return None if row is None else self.author_ids[row]

    def topic_of(self, note_id: str) -> str | None:
        row = self.row_of.get(note_id)
        return None if row is None else self.topics[row]

    def exists_at(self, t_us: int) -> np.ndarray:
        """bool [N]: created before t, or without a creation time. A replay must not show notes from its future."""
        return self.created_us_N < t_us

    @cached_property
    def freshness_us(self) -> np.ndarray:
        """int64 [N]: when a note was created, else first seen; UNKNOWN_US if neither is known."""
        return np.where(self.created_us_N == UNKNOWN_US, self.first_seen_us_N, self.created_us_N)

    @cached_property
    def rows_by_freshness(self) -> np.ndarray:
        """int64: rows of which it is known how fresh they are, the freshest first, ties by row."""
        order = np.argsort(-self.freshness_us.astype(np.float64), kind="stable")
        return order[self.freshness_us[order] != UNKNOWN_US]

    @cached_property
    def authors(self) -> list[str]:
        """In the order of `author_rows`."""
        return list(self.rows_of_author)

    def rows(self, note_ids: Sequence[str]) -> np.ndarray:
        """int64 [C]: each note's row, -1 for one that is unknown."""
        return np.fromiter(map(self.row_of.get, note_ids, repeat(-1)), np.int64, len(note_ids))

    @cached_property
    def note_id_column(self) -> pa.Array:
        """Text of Arrow [N]: `note_ids`."""
        return pa.array(self.note_ids, pa.string())

    @cached_property
    def author_column(self) -> pa.Array:
        """Text of Arrow: `authors`."""
        return pa.array(self.authors, pa.string())

    def author_rows(self, row_C: np.ndarray) -> np.ndarray:
        """int64 [C]: the authors' places in `rows_of_author`, -1 for none."""
        return _taken(self.author_row_N, np.ascontiguousarray(row_C), -1)

    def request_features(self, row_C: np.ndarray, t_us: int) -> np.ndarray:
        """float64 [C, 2] in the order of REQUEST_FEATURES. All NaN for a note that is unknown or not created before t,
        as in the training examples (a note without a creation time among them)."""
        row_C = np.ascontiguousarray(row_C)
        return _request_features(row_C, self.created_us_N, self.duration_ms_N, t_us, UNKNOWN_US, MINUTE_US)


_ROWS, _NUMBERS = only_read(types.int64), only_read(types.float64)


@compiled(types.float64[:, ::1](_ROWS, _ROWS, _NUMBERS, types.int64, types.int64, types.int64))
def _request_features(
    row_C: np.ndarray, created_us_N: np.ndarray, duration_ms_N: np.ndarray, t_us: int, unknown_us: int, minute_us: int
) -> np.ndarray:
    values_CF = np.full((len(row_C), 2), np.nan)
    for c, row in enumerate(row_C):
        if row >= 0 and created_us_N[row] != unknown_us and created_us_N[row] < t_us:
            values_CF[c, 0] = duration_ms_N[row]
            values_CF[c, 1] = (t_us - created_us_N[row]) / minute_us
    return values_CF


@compiled(types.int64[::1](_ROWS, _ROWS, types.int64))
def _taken(values_N: np.ndarray, row_C: np.ndarray, missing: int) -> np.ndarray:
    """values_N at the rows, `missing` where a row is -1."""
    taken_C = np.empty(len(row_C), np.int64)
    for c, row in enumerate(row_C):
        taken_C[c] = values_N[row] if row >= 0 else missing
    return taken_C
