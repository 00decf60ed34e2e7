"""What is looked up through the index of event ids is what a search of every file finds."""

import numpy as np
import pytest

from streaming_sql.event_index import INDEX_FOLDER, EventIndex, sought
from streaming_sql.event_log import EventLog
from streaming_sql.history import LakeAndLog
from tests.streaming_sql.generated import ListHistory, alive, as_table
from tests.streaming_sql.test_risingwave_models import a_log
from warehouse.clock import ManualClock
from warehouse.connections import duckdb_connection
from warehouse.data_files import DataFiles
from warehouse.features.declarations import load_groups
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import EVENTS, create_tables, land_records, landed_position
from warehouse.maintenance import compact
from warehouse.time_algebra import DAY_US

KEYS = [group.entity_keys for group in load_groups().values()]
FILES = 12


class World:
    """A lake of several landings, and a log at whose end nothing waits."""

    def __init__(self, path, records):
        self.home, self.records = Home(path), records
        self.lake = Lake.open(self.home)
        create_tables(self.lake)
        size = -(-len(records) // FILES)
        for start in range(0, len(records), size):
            ends = [0, 0]
            for record in records[: start + size]:
                ends[record["log_partition"]] = record["log_offset"] + 1
            land_records(self.lake, as_table(records[start : start + size]), tuple(ends))
        self.position = landed_position(self.lake)
        self.log = EventLog.open(self.home.log, clock=ManualClock(records[-1]["landed_at"]), start=self.position)
        self.everything = ListHistory()
        self.everything.records = records

    @property
    def index_folder(self):
        return self.home.online / INDEX_FOLDER

    def files(self):
        return DataFiles().of(self.lake.table(EVENTS))

    def assert_same(self, history, event_ids):
        since_us = self.records[0]["landed_at"] - 40 * DAY_US
        found, expected = (
            {tuple(row.values()) for row in one.around(event_ids, KEYS, self.position, since_us).to_pylist()}
            for one in (history, self.everything)
        )
        assert found == expected
        return len(found)


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path, alive(a_log(31, 900)))
    yield world
    world.log.close()


def test_each_event_is_found_with_all_that_decides_its_block(world):
    history = LakeAndLog(world.lake, world.log)
    ids = sorted({record["event_id"] for record in world.records})
    sizes = [world.assert_same(history, [event_id]) for event_id in ids[::7]]
    assert max(sizes) > 5
    world.assert_same(history, ids[:40])
    assert world.assert_same(history, ["no such event"]) == 0


def test_few_files_are_opened_for_one_event(world):
    index, connection = EventIndex(world.index_folder), duckdb_connection()
    index.follow(world.files())
    assert len(world.files()) >= FILES

    def holding(column, value):
        wanted = connection.execute(sought(column, f"select {value}")).fetchnumpy()["sought"]
        return set(index.holding(column, wanted))

    for record in world.records[::50]:
        for column, text in (("event_id", record["event_id"]), ("retracts", record["retracts"])):
            if text is None:
                continue
            there = {
                path
                for path in world.files()
                if connection.execute(f"select count(*) from read_parquet(?) where {column} = ?", [path, text]).fetchone()[0]
            }
            assert holding(column, f"'{text}'") == there
            assert (len(there) < 5) or column == "retracts"
    assert holding("event_id", "'no such event'") == holding("event_id", "null::varchar") == set()


def test_the_index_is_taken_up_again_and_made_again_where_it_is_damaged(world):
    LakeAndLog(world.lake, world.log).prepare()
    made = {path.name: path.stat().st_mtime_ns for path in world.index_folder.iterdir()}
    assert len(made) == len(world.files())
    torn, *_ = sorted(world.index_folder.iterdir())
    torn.write_bytes(torn.read_bytes()[:100])
    history = LakeAndLog(world.lake, world.log)
    world.assert_same(history, [world.records[5]["event_id"]])
    again = {path.name: path.stat().st_mtime_ns for path in world.index_folder.iterdir()}
    assert {name for name in made if made[name] != again[name]} == {torn.name}


def test_compaction_leaves_an_index_of_the_files_that_there_are(world):
    history = LakeAndLog(world.lake, world.log)
    event_id = world.records[100]["event_id"]
    world.assert_same(history, [event_id])
    assert compact(world.lake, world.home, EVENTS, load_groups())
    assert len(world.files()) < FILES
    world.assert_same(history, [event_id])
    assert {path.name.removesuffix(".arrays") for path in world.index_folder.iterdir()} == {
        path.rpartition("/")[2] for path in world.files()
    }


def test_a_folder_that_cannot_be_written_leaves_the_index_in_memory(world, caplog):
    world.index_folder.write_text("no folder")
    history = LakeAndLog(world.lake, world.log)
    world.assert_same(history, [world.records[5]["event_id"]])
    assert caplog.text.count("stays in memory") == 1


def test_the_files_of_a_snapshot_are_those_that_iceberg_plans(world):
    def planned():
        return {task.file.file_path.removeprefix("file://") for task in world.lake.table(EVENTS).scan().plan_files()}

    files = DataFiles()
    assert set(files.of(world.lake.table(EVENTS))) == planned()
    rows = world.lake.scan(EVENTS).slice(0, 3)
    world.lake.append(EVENTS, rows)
    assert set(files.of(world.lake.table(EVENTS))) == planned()
    world.lake.replace(EVENTS, rows)
    assert set(files.of(world.lake.table(EVENTS))) == planned()
    assert np.all([path.endswith(".parquet") for path in planned()])
