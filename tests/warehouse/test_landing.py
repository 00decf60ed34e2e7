"""Landing: exactly once, nothing half-written, bad rows set aside with a reason."""

import datetime as dt
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.types import StringType

from tests.parity.generated_events import event_log
from warehouse.clock import ManualClock
from warehouse.datasets.simulator import simulate
from warehouse.errors import HeadraceError
from warehouse.events import EVENTS_SCHEMA
from warehouse.features.generated import as_table
from warehouse.landing import DEAD_LETTERS, EVENTS, create_tables, land_dataset, land_records, landed_position
from warehouse.landing_files import land_file
from warehouse.time_algebra import DAY_US

NOW_US = 1_767_225_600_000_000


def write_ndjson(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def good(event_id, **more):
    return {"event_id": event_id, "event_type": "view", "user_id": "u1", "event_ts": "2026-01-01T00:00:00Z", **more}


def test_a_second_landing_of_the_same_data_set_adds_nothing(lake):
    dataset = simulate(seed=3, num_users=30, num_notes=60, days=1)
    first = land_dataset(lake, dataset)
    rows = lake.scan(EVENTS).num_rows
    again = land_dataset(lake, dataset)
    assert first.num_events == dataset.events.num_rows
    assert (again.already, again.num_events, lake.scan(EVENTS).num_rows) == (True, 0, rows)
    assert lake.scan("lake.notes").num_rows == dataset.notes.num_rows


def test_offsets_are_dense_and_landing_never_runs_backwards_in_a_partition(lake):
    land_dataset(lake, simulate(seed=3, num_users=30, num_notes=60, days=1))
    rows = lake.scan(EVENTS).sort_by([("log_partition", "ascending"), ("log_offset", "ascending")]).to_pylist()
    for partition, end in enumerate(landed_position(lake)):
        mine = [row for row in rows if row["log_partition"] == partition]
        assert [row["log_offset"] for row in mine] == list(range(end))
        assert [row["landed_at"] for row in mine] == sorted(row["landed_at"] for row in mine)
        assert mine[-1]["event_type"] == "heartbeat"


def test_history_that_would_change_a_served_tick_lands_now(lake):
    dataset = simulate(seed=3, num_users=40, num_notes=60, days=1)
    land_dataset(lake, dataset)
    late = simulate(seed=4, num_users=40, num_notes=60, days=1)
    last = max(lake.scan(EVENTS)["landed_at"].to_pylist())
    now_us = int(last.timestamp() * 1e6) + DAY_US
    land_dataset(lake, late, clock=ManualClock(now_us))
    added = lake.scan(EVENTS, "landing = 'log'").to_pylist()
    assert added
    assert {int(row["landed_at"].timestamp() * 1e6) for row in added} == {now_us}


def test_records_of_the_log_land_once_whatever_is_repeated(lake):
    from random import Random

    rows = event_log(Random(5))
    table = as_table(rows)
    position = tuple(sum(row["log_partition"] == partition for row in rows) for partition in (0, 1))
    assert (
        land_records(lake, table.slice(0, 30), tuple(sum(row["log_partition"] == p for row in rows[:30]) for p in (0, 1))) == 30
    )
    assert land_records(lake, table, position) == len(rows) - 30
    assert land_records(lake, table, position) == 0
    assert landed_position(lake) == position
    assert lake.scan(EVENTS).num_rows == len(rows)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (good(None), "event_id is missing"),
        (good("a", event_type=""), "event_type is missing"),
        (good("a", event_ts="2026-01-01T00:00:00"), "not a time with a zone"),
        (good("a", event_ts="yesterday"), "not a time with a zone"),
        (good("a", event_ts="2025-12-01T00:00:00Z"), "older on arrival than the duplicate memory of 7 days"),
        (good("a", event_ts="2026-01-01T02:00:00Z"), "more than 10 minutes ahead"),
        (good("a", event_type="heartbeat"), "reserved"),
        (good("a", retracts="b"), "retracts belongs to event_type retraction"),
        (good("a", event_type="retraction"), "a retraction names the event_id that it takes back"),
        (good("a", event_type="retraction", retracts=""), "a retraction names the event_id that it takes back"),
        (good("a", properties="[1]"), "not a JSON object"),
        (good("a", properties="{"), "not valid JSON"),
    ],
)
def test_a_bad_row_is_set_aside_with_the_reason_and_the_rest_land(lake, tmp_path, row, reason):
    path = write_ndjson(tmp_path / "events.ndjson", [row, good("fine", watch_ms=5)])
    landed = land_file(lake, path, clock=ManualClock(NOW_US))
    assert (landed.num_events, landed.num_dead_letters) == (1, 1)
    letter = lake.scan(DEAD_LETTERS).to_pylist()[0]
    assert reason in letter["reason"]
    assert letter["source"] == "events.ndjson"
    kept = [event for event in lake.scan(EVENTS).to_pylist() if event["event_type"] != "heartbeat"]
    assert [event["event_id"] for event in kept] == ["fine"]
    assert land_file(lake, path, clock=ManualClock(NOW_US)).already
    assert lake.scan(DEAD_LETTERS).num_rows == 1


def test_csv_parquet_and_ndjson_land_alike(lake, tmp_path):
    (tmp_path / "a.csv").write_text("event_id,event_type,event_ts,user_id,watch_ms\nc,watch,2026-01-01T00:00:00Z,u1,7\n")
    write_ndjson(tmp_path / "b.ndjson", [good("n", event_type="watch", watch_ms=7)])
    table = pa.table(
        {
            "event_id": ["p"],
            "event_type": ["watch"],
            "user_id": ["u1"],
            "watch_ms": [7],
            "event_ts": pa.array([NOW_US], pa.timestamp("us", "UTC")),
        }
    )
    pq.write_table(table, tmp_path / "c.parquet")
    for name in ("a.csv", "b.ndjson", "c.parquet"):
        assert land_file(lake, tmp_path / name, delay_seconds=2).num_events == 1
    events = {row["event_id"]: row for row in lake.scan(EVENTS, "event_type = 'watch'").to_pylist()}
    assert {int(json.loads(row["properties"])["watch_ms"]) for row in events.values()} == {7}
    assert {row["event_ts"] for row in events.values()} == {events["p"]["event_ts"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"event_id,when\na,b\n", "has no column event_type, event_ts; it has event_id, when"),
        ("x.parquet", b"PAR1 this is no parquet", "cannot be read as parquet"),
        ("x.ndjson", b'{"event_id": ', "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_lands_nothing(lake, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HeadraceError, match=message):
        land_file(lake, tmp_path / name)
    assert not lake.exists(EVENTS)


def test_a_time_without_a_zone_is_refused_before_anything_lands(lake, tmp_path):
    pq.write_table(
        pa.table({"event_id": ["a"], "event_type": ["view"], "event_ts": pa.array([NOW_US], pa.timestamp("us"))}),
        tmp_path / "x.parquet",
    )
    with pytest.raises(HeadraceError, match="without a zone"):
        land_file(lake, tmp_path / "x.parquet")


def test_a_lake_of_an_older_version_gets_new_columns_and_wider_types_without_a_rewrite(lake):
    older = pa.schema(
        [
            field.with_type(pa.int32()) if field.name == "log_offset" else field
            for field in EVENTS_SCHEMA
            if field.name != "retracts"
        ]
    )
    lake.create(EVENTS, older, {"landed_at": "hour"})
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    row = {"event_id": "old", "event_type": "view", "event_ts": now, "landed_at": now, "log_partition": 0, "log_offset": 0}
    row |= {"landing": "log", "properties": '{"a": 1}'}
    lake.append(EVENTS, pa.Table.from_pylist([row], schema=older), {"headrace.position": "[1, 0]"})
    files = lake.table(EVENTS).inspect.files()["file_path"].to_pylist()
    wide = row | {"event_id": "new", "log_offset": 2**40, "retracts": "old", "properties": '{"a": 1, "brand_new": true}'}
    assert land_records(lake, pa.Table.from_pylist([wide], schema=EVENTS_SCHEMA), (2**40 + 1, 0)) == 1
    assert set(files) < set(lake.table(EVENTS).inspect.files()["file_path"].to_pylist())
    expected = [("new", 2**40, "old"), ("old", 0, None)]
    query = "select event_id, log_offset, retracts from lake.events order by event_id"
    with lake.duckdb() as connection:
        assert connection.execute(query).fetchall() == expected
    by_pyiceberg = lake.scan(EVENTS).sort_by("event_id").select(["event_id", "log_offset", "retracts"]).to_pylist()
    assert [tuple(one.values()) for one in by_pyiceberg] == expected
    assert lake.evolve(EVENTS, EVENTS_SCHEMA) is False


def test_a_column_of_someone_elses_stays_and_a_type_that_needs_a_rewrite_is_refused(lake):
    create_tables(lake)
    with lake.table(EVENTS).update_schema() as update:
        update.add_column("ours", StringType())
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    row = {"event_id": "e", "event_type": "view", "event_ts": now, "landed_at": now, "log_partition": 0, "log_offset": 0}
    assert land_records(lake, pa.Table.from_pylist([row | {"landing": "log"}], schema=EVENTS_SCHEMA), (1, 0)) == 1
    assert lake.scan(EVENTS)["ours"].to_pylist() == [None]
    lake.create("lake.other", pa.schema([pa.field("a", pa.string())]))
    with pytest.raises(HeadraceError, match=r"lake\.other cannot take its new columns without a rewrite"):
        lake.evolve("lake.other", pa.schema([pa.field("a", pa.int64())]))
