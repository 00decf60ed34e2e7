import json

import pyarrow as pa

from serving.readers import Readers
from warehouse.events import EVENTS_SCHEMA
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import EVENTS, USERS, USERS_SCHEMA, create_tables

NOW = 1_651_767_000_000_000


def lake_with(tmp_path, events, users=()):
    lake = Lake.open(Home(tmp_path))
    create_tables(lake)
    rows = [
        {
            "event_id": f"e{place}",
            "event_type": event_type,
            "user_id": user_id,
            "note_id": note_id,
            "author_id": author_id,
            "event_ts": event_us,
            "landed_at": NOW,
            "log_partition": 0,
            "log_offset": place,
            "landing": "log",
            "properties": json.dumps({}),
        }
        for place, (event_type, user_id, note_id, author_id, event_us) in enumerate(events)
    ]
    lake.append(EVENTS, pa.Table.from_pylist(rows, schema=EVENTS_SCHEMA))
    if users:
        lake.append(USERS, pa.Table.from_pylist(users, schema=USERS_SCHEMA))
    return lake


def test_seen_notes_are_kept_by_their_last_event_newest_last_and_bounded(tmp_path):
    lake = lake_with(
        tmp_path,
        [
            ("view", "u1", "n1", "a", NOW - 50),
            ("view", "u1", "n2", "a", NOW - 40),
            ("view", "u1", "n3", "a", NOW - 30),
            ("click", "u1", "n1", "a", NOW - 20),
            ("view", "u1", "future", "a", NOW),
            ("view", None, "n9", "a", NOW - 9),
            ("follow", "u1", None, "a", NOW - 8),
        ],
    )
    assert Readers.from_lake(lake, 10, NOW).seen("u1") == ["n2", "n3", "n1"]
    readers = Readers.from_lake(lake, 2, NOW)
    assert readers.seen("u1") == ["n3", "n1"]
    readers.note_events([{"event_type": "view", "user_id": "u1", "note_id": "n3"}])
    assert readers.seen("u1") == ["n1", "n3"]
    readers.note_events([{"event_type": "view", "user_id": "u1", "note_id": "n4"}])
    assert readers.seen("u1") == ["n3", "n4"]
    assert readers.seen("nobody") == []
    assert readers.most_active(5) == [("u1", 2)]


def test_follows_come_from_the_lake_and_from_events_since(tmp_path):
    events = [("follow", "u1", "n1", "b", NOW - 2), ("follow", "u1", "n2", "a", NOW - 1), ("click", "u1", "n3", "c", NOW - 1)]
    readers = Readers.from_lake(lake_with(tmp_path, events), 10, NOW)
    assert readers.follows("u1") == ["a", "b"]
    readers.note_events([{"event_type": "follow", "user_id": "u1", "author_id": "z"}, {"event_type": "view", "user_id": None}])
    assert readers.follows("u1") == ["a", "b", "z"]
    assert readers.follows("nobody") == []


def test_a_follow_that_was_taken_back_is_none(tmp_path):
    events = [("follow", "u1", None, "b", NOW - 3), ("follow", "u1", None, "a", NOW - 2), ("follow", "u1", None, "a", NOW - 1)]
    lake = lake_with(tmp_path, events)
    readers = Readers.from_lake(lake, 10, NOW)

    def take_back(event_id):
        readers.note_events([{"event_type": "retraction", "user_id": "u1", "note_id": "n7", "retracts": event_id}])
        return readers.follows("u1")

    assert take_back("e1") == ["a", "b"]  # e2 still says so
    assert take_back("e2") == ["b"]
    assert take_back("e0") == []
    assert readers.seen("u1") == []
    row = lake.scan(EVENTS, "event_id = 'e0'").to_pylist()[0]
    row |= {"event_id": "r", "event_type": "retraction", "retracts": "e0", "author_id": None, "log_offset": 3}
    lake.append(EVENTS, pa.Table.from_pylist([row], schema=EVENTS_SCHEMA))
    assert Readers.from_lake(lake, 10, NOW).follows("u1") == ["a"]


def test_the_history_before_the_log_comes_with_the_reader(tmp_path):
    user = {
        "user_id": "u2",
        "created_at": None,
        "attributes": None,
        "history_note_ids": ["n5", "n6"],
        "history_liked_note_ids": [],
    }
    readers = Readers.from_lake(lake_with(tmp_path, [("view", "u1", "n1", "a", NOW - 1)], [user]), 10, NOW)
    assert readers.history_before_the_log("u2") == ["n5", "n6"]
    assert readers.history_before_the_log("u1") == []
    assert readers.known("u1")
    assert readers.known("u2")
    assert not readers.known("u3")
    assert len(readers) == 2
