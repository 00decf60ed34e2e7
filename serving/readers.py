"""What each reader follows and has already seen: read from `lake.events` at start, kept up with every posted event.

Knows nothing of features: it only decides which notes may be shown and whose notes are wanted. Bounded per reader.
"""

import sys
import threading
import time
from collections.abc import Iterable, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from warehouse.events import RETRACTION
from warehouse.lake import Lake

FOLLOW = "follow"
HIDE = "hide"
_NOTED = ("user_id", "note_id", "author_id", "event_type", "event_id", "retracts")


class Readers:
    """Safe to read and to note events from several threads."""

    def __init__(self, seen_per_user: int):
        self._seen_per_user = seen_per_user
        self._seen: dict[str, dict[str, None]] = {}  # insertion order is age: the newest is last
        self._follows: dict[str, dict[str, set[str]]] = {}  # user -> author -> the events that say so
        self._hidden: dict[str, dict[str, str]] = {}  # user -> the event that says so -> note
        self._histories: dict[str, list[str]] = {}
        self._attributes: dict[str, str] = {}
        self._num_events: dict[str, int] = {}  # since the start
        self._noted_s: dict[str, float] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_lake(cls, lake: Lake, seen_per_user: int, t_us: int) -> "Readers":
        """Every event with a reader before t (microseconds), oldest first, and the history that came with `lake.users`."""
        readers = cls(seen_per_user)
        with lake.duckdb() as connection:
            seen = connection.execute(
                """
                select user_id, list(note_id order by last_us, note_id) as note_ids
                from (
                    select user_id, note_id, max(epoch_us(event_ts)) as last_us
                    from lake.events
                    where
                        user_id is not null and note_id is not null and epoch_us(event_ts) < $t_us
                        and event_type <> 'retraction'
                    group by user_id, note_id
                    qualify row_number() over (partition by user_id order by last_us desc, note_id desc) <= $seen_per_user
                )
                group by user_id
                """,
                {"t_us": t_us, "seen_per_user": seen_per_user},
            ).fetchall()
            follows = connection.execute(
                """
                select user_id, author_id, list(event_id) as event_ids
                from lake.events
                where
                    event_type = 'follow' and user_id is not null and author_id is not null and epoch_us(event_ts) < $t_us
                    and event_id not in (select retracts from lake.events where retracts is not null)
                group by user_id, author_id
                order by user_id, author_id
                """,
                {"t_us": t_us},
            ).fetchall()
            hidden = connection.execute(
                """
                select user_id, event_id, note_id
                from lake.events
                where
                    event_type = 'hide' and user_id is not null and note_id is not null and epoch_us(event_ts) < $t_us
                    and event_id not in (select retracts from lake.events where retracts is not null)
                order by event_ts, event_id
                """,
                {"t_us": t_us},
            ).fetchall()
        for user_id, event_id, note_id in hidden:
            readers._hidden.setdefault(user_id, {})[event_id] = note_id
        readers._seen = {user_id: dict.fromkeys(map(sys.intern, note_ids)) for user_id, note_ids in seen}
        for user_id, author_id, event_ids in follows:
            readers._follows.setdefault(user_id, {})[author_id] = set(event_ids)
        columns = ("user_id", "history_note_ids", "attributes")
        users = lake.scan("lake.users", columns=columns)
        for user_id, history, attributes in zip(*(users[name].to_pylist() for name in columns), strict=True):
            if history:
                readers._histories[user_id] = [sys.intern(note_id) for note_id in history if note_id is not None]
            if attributes:
                readers._attributes[user_id] = attributes
        return readers

    def note_records(self, records: pa.Table) -> list[str]:
        """`note_events` of records of the log (EVENTS_SCHEMA); the readers that are among them."""
        events = records.select(_NOTED).filter(pc.is_valid(records["user_id"])).to_pylist()
        return self.note_events(events)

    def note_events(self, events: Iterable[Mapping]) -> list[str]:
        """Events that the log has; noting one again changes nothing but `num_events`. Looked at are `user_id`, `note_id`,
        `author_id`, `event_type`, `event_id` and `retracts`. Returns the readers."""
        user_ids: dict[str, None] = {}
        with self._lock:
            for event in events:
                user_id, note_id, author_id = event.get("user_id"), event.get("note_id"), event.get("author_id")
                if user_id is None:
                    continue
                user_ids[user_id] = None
                self._noted_s[user_id] = time.monotonic()
                self._num_events[user_id] = self._num_events.get(user_id, 0) + 1
                if note_id is not None and event.get("event_type") != RETRACTION:
                    seen = self._seen.setdefault(user_id, {})
                    seen.pop(note_id, None)
                    seen[note_id] = None
                    if len(seen) > self._seen_per_user:
                        del seen[next(iter(seen))]
                if event.get("event_type") == FOLLOW and author_id is not None:
                    self._follows.setdefault(user_id, {}).setdefault(author_id, set()).add(event.get("event_id", ""))
                if event.get("event_type") == HIDE and note_id is not None:
                    self._hidden.setdefault(user_id, {})[event.get("event_id", "")] = note_id
                if event.get("event_type") == RETRACTION:
                    self._hidden.get(user_id, {}).pop(event.get("retracts", ""), None)
                    self._unfollow(user_id, event.get("retracts", ""))
        return list(user_ids)

    def _unfollow(self, user_id: str, event_id: str) -> None:
        follows = self._follows.get(user_id, {})
        for author_id, event_ids in list(follows.items()):
            event_ids.discard(event_id)
            if not event_ids:
                del follows[author_id]

    def seen(self, user_id: str) -> list[str]:
        """The reader's notes, the longest ago first; empty for a reader never met."""
        with self._lock:
            return list(self._seen.get(user_id, ()))

    def follows(self, user_id: str) -> list[str]:
        with self._lock:
            return list(self._follows.get(user_id, ()))

    def hidden(self, user_id: str) -> list[str]:
        """Notes that the reader does not want to see again."""
        with self._lock:
            return list(self._hidden.get(user_id, {}).values())

    def history_before_the_log(self, user_id: str) -> list[str]:
        """Notes watched before the first event, oldest first."""
        return self._histories.get(user_id, [])

    def num_events(self, user_id: str) -> int:
        """Of the reader since the server started: what is kept for a reader goes by it."""
        return self._num_events.get(user_id, 0)

    def noted_s(self, user_id: str) -> float:
        """When the reader's newest event was noted, as `time.monotonic` tells it; 0 if none was since the server started."""
        return self._noted_s.get(user_id, 0.0)

    def attributes(self, user_id: str) -> str | None:
        """JSON of `lake.users.attributes`; None for a reader without any."""
        return self._attributes.get(user_id)

    def known(self, user_id: str) -> bool:
        return user_id in self._seen or user_id in self._histories

    def most_active(self, limit: int) -> list[tuple[str, int]]:
        """(user_id, number of notes seen), most first: for the page's list of readers."""
        with self._lock:
            counts = [(user_id, len(seen)) for user_id, seen in self._seen.items()]
        return sorted(counts, key=lambda pair: (-pair[1], pair[0]))[:limit]

    def __len__(self) -> int:
        return len(self._seen.keys() | self._histories.keys())
