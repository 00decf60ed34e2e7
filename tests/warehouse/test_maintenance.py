"""Upkeep changes no row, loses no position, and gives way to writers beside it."""

import json
import os
import random
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from pyiceberg.expressions import AlwaysTrue

from tests.warehouse.test_cli import small_disk  # noqa: F401
from warehouse import maintenance
from warehouse.errors import HeadraceError
from warehouse.events import EVENTS_SCHEMA, TIMESTAMP
from warehouse.features.declarations import load_groups
from warehouse.home import Home
from warehouse.lake import BUILT_UNTIL, Lake
from warehouse.lake_cli import age, main
from warehouse.landing import EVENTS, POSITION, create_tables, land_records, landed_position
from warehouse.maintenance import compact, expire, orphans, remove_orphans

NOON_US = 1_767_268_800_000_000
GROUPS = load_groups()


def records(first: int, count: int) -> pa.Table:
    """Events of partition 0 at these offsets, one a minute."""
    rows = [
        {
            "event_id": f"e{offset}",
            "event_type": "view",
            "note_id": f"n{offset % 3}",
            "event_ts": NOON_US + offset * 60_000_000,
            "landed_at": NOON_US + offset * 60_000_000,
            "log_partition": 0,
            "log_offset": offset,
            "landing": "log",
        }
        for offset in range(first, first + count)
    ]
    return pa.Table.from_pylist(rows, schema=EVENTS_SCHEMA)


def land_in_steps(lake, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        land_records(lake, records(step * 5, 5), (step * 5 + 5, 0))


def files(lake, name: str) -> list[str]:
    return [task.file.file_path.removeprefix("file://") for task in lake.table(name).scan().plan_files()]


def ids(lake) -> list[str]:
    return sorted(lake.scan(EVENTS)["event_id"].to_pylist())


def test_compaction_keeps_rows_order_and_position_in_one_commit(lake, home):
    land_in_steps(lake, 12)
    before, snapshots = lake.scan(EVENTS).sort_by("log_offset"), len(lake.table(EVENTS).metadata.snapshots)
    done = compact(lake, home, EVENTS, GROUPS)
    assert (done.files_before, done.files_after, done.rows) == (12, 1, 60)
    assert lake.scan(EVENTS).equals(before)
    assert len(lake.table(EVENTS).metadata.snapshots) == snapshots + 1
    assert landed_position(lake) == (60, 0)
    assert lake.properties(EVENTS)[POSITION] == "[60, 0]"
    assert land_records(lake, records(0, 65), (65, 0)) == 5  # the lander goes on where it was
    with lake.duckdb() as connection:
        assert connection.execute(f"select count(*), count(distinct event_id) from {EVENTS}").fetchall() == [(65, 65)]


def test_compacting_again_commits_nothing(lake, home):
    land_in_steps(lake, 3)
    compact(lake, home, EVENTS, GROUPS)
    state = lake.table(EVENTS).metadata_location
    assert compact(lake, home, EVENTS, GROUPS).rows == 0
    assert lake.table(EVENTS).metadata_location == state


def test_blocks_are_sorted_by_key_within_their_partition_and_stay_built_until(lake, home):
    name = "features.note_engagement"
    day_us = 86_400_000_000

    def blocks(key: str, day: int) -> pa.Table:
        at = pa.array([NOON_US + day * day_us], TIMESTAMP)
        return pa.table({"note_id": [key], "block_start": at, "known_at": at, "num_views": [1]})

    lake.create(name, blocks("a", 0).schema, {"known_at": "day"})
    for key in "dbca":
        lake.append(name, pa.concat_tables([blocks(key, 0), blocks(key, 1)]))
    with lake.transaction(name) as transaction:
        transaction.set_properties({BUILT_UNTIL: "2026-02-01T00:00:00+00:00"})
    done = compact(lake, home, name, GROUPS)
    assert (done.files_before, done.files_after) == (8, 2)
    for path in files(lake, name):
        assert pa.parquet.read_table(path)["note_id"].to_pylist() == ["a", "b", "c", "d"]
    assert lake.table(name).properties[BUILT_UNTIL] == "2026-02-01T00:00:00+00:00"


def test_an_append_in_the_middle_of_a_compaction_is_kept_and_its_position_too(lake, home, monkeypatch):
    land_in_steps(lake, 4)
    swap = maintenance._swap

    def land_then_swap(*arguments) -> None:
        land_in_steps(lake, 1, first=4)
        swap(*arguments)

    monkeypatch.setattr(maintenance, "_swap", land_then_swap)
    assert compact(lake, home, EVENTS, GROUPS).rows == 20
    assert ids(lake) == sorted(f"e{offset}" for offset in range(25))
    assert landed_position(lake) == (25, 0)
    assert lake.properties(EVENTS)[POSITION] == "[25, 0]"


def test_appends_and_compactions_at_once_lose_and_repeat_nothing(lake, home):
    land_in_steps(lake, 2)
    errors: list[Exception] = []

    def land() -> None:
        try:
            land_in_steps(lake, 12, first=2)
        except Exception as error:
            errors.append(error)

    lander = threading.Thread(target=land)
    lander.start()
    while lander.is_alive():
        compact(lake, home, EVENTS, GROUPS)
    lander.join()
    assert errors == []
    assert ids(lake) == sorted(f"e{offset}" for offset in range(70))
    assert landed_position(lake) == (70, 0)


def test_files_that_a_writer_replaced_meanwhile_are_left_to_it(lake, home, monkeypatch):
    name = "features.other"
    lake.create(name, pa.schema([("value", pa.int64())]))
    for value in (1, 2):
        lake.append(name, pa.table({"value": [value]}))
    swap = maintenance._swap

    def replace_then_swap(*arguments) -> None:
        lake.table(name).overwrite(pa.table({"value": [7]}), AlwaysTrue())
        swap(*arguments)

    monkeypatch.setattr(maintenance, "_swap", replace_then_swap)
    with pytest.raises(HeadraceError, match=r"features.other: 2 of 2 files were replaced.*run the same command again"):
        compact(lake, home, name, GROUPS)
    assert lake.scan(name)["value"].to_pylist() == [7]
    assert orphans(lake, timedelta(0), datetime.now(UTC) + timedelta(minutes=1)) == []  # its own new files are gone


def test_a_table_that_dbt_is_building_is_not_swapped(lake, home, monkeypatch):
    name = "features.other"
    lake.create(name, pa.schema([("value", pa.int64())]))
    for value in (1, 2):
        lake.append(name, pa.table({"value": [value]}))
    with lake.transaction(name) as transaction:
        transaction.set_properties({BUILT_UNTIL: "2026-02-01T00:00:00+00:00"})
    monkeypatch.setattr(maintenance, "BUILD_WAIT_S", 0.2)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)\n"
         "print('held', flush=True); time.sleep(60)", str(home.dbt / "build.lock")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(HeadraceError, match=r"a dbt command runs and may write features.other; nothing changed"):
            compact(lake, home, name, GROUPS)
    finally:
        holder.kill()
        holder.communicate()
    assert len(files(lake, name)) == 2
    assert compact(lake, home, name, GROUPS).files_after == 1


def test_expiry_removes_only_what_no_snapshot_names_and_keeps_the_position(lake, home):
    land_in_steps(lake, 4)
    compact(lake, home, EVENTS, GROUPS)
    lake.append(EVENTS, records(100, 1))  # a newest snapshot that says no position, as a tool of another make may leave
    before, old_files = ids(lake), set(files(lake, EVENTS))
    later = datetime.now(UTC) + timedelta(minutes=1)
    foretold = expire(lake, EVENTS, later, dry_run=True)
    assert len(lake.table(EVENTS).metadata.snapshots) == 6
    done = expire(lake, EVENTS, later)
    assert foretold == done
    assert done.snapshots == 4
    assert done.files >= 4 + 4  # data files and manifest lists
    assert done.bytes > 0
    assert ids(lake) == before
    assert set(files(lake, EVENTS)) == old_files
    assert landed_position(lake) == (20, 0)
    with lake.duckdb() as connection:
        assert connection.execute(f"select count(*) from {EVENTS}").fetchall() == [(21,)]
    assert expire(lake, EVENTS, datetime.now(UTC) - timedelta(days=7)).snapshots == 0


def test_a_position_that_another_tool_expired_is_an_error_and_not_a_start_from_zero(lake):
    land_in_steps(lake, 2)
    lake.append(EVENTS, records(100, 1))
    table = lake.table(EVENTS)
    table.maintenance.expire_snapshots().older_than(datetime.now() + timedelta(minutes=1)).commit()
    with pytest.raises(HeadraceError, match="does not say how far the log has landed"):
        landed_position(lake)


def test_orphans_are_old_files_that_no_snapshot_names(lake, home):
    land_in_steps(lake, 2)
    create_tables(lake)
    folder = lake.folder / "warehouse" / "lake" / "events" / "data"
    stray, young = folder / "stray.parquet", folder / "young.parquet"
    for path in (stray, young):
        path.write_bytes(b"half a file")
    two_days_ago = datetime.now().timestamp() - 2 * 86400
    for path in (lake.folder / "warehouse").rglob("*"):
        if path != young:
            os.utime(path, (two_days_ago, two_days_ago))
    found = orphans(lake)
    assert [orphan.path for orphan in found] == [stray]
    remove_orphans(found)
    assert not stray.exists()
    assert young.exists()
    assert len(ids(lake)) == 10


def test_a_compaction_that_finds_the_disk_full_says_so_and_leaves_the_lake_as_it_was(small_disk, monkeypatch):  # noqa: F811
    disk, resize = small_disk
    resize("100m")
    monkeypatch.setenv("HEADRACE_HOME", str(disk / "home"))
    lake, name = Lake.open(Home(disk / "home")), "features.other"
    lake.create(name, pa.schema([("value", pa.string())]))
    draw = random.Random(7)
    for _ in range(4):
        lake.append(name, pa.table({"value": [draw.randbytes(1000).hex() for _ in range(3000)]}))
    before, state = lake.scan(name), lake.table(name).metadata_location
    used = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())
    resize(f"{used // 1024 + 2000}k")
    with pytest.raises(HeadraceError, match=f"no space is left on the disk of {disk / 'home'}; no table was left half-written"):
        main(["lake", "compact", "--table", name])
    assert lake.table(name).metadata_location == state
    assert lake.scan(name).equals(before)
    resize("200m")
    assert main(["lake", "compact", "--table", name]) == 0
    assert len(files(lake, name)) == 1
    assert lake.scan(name).equals(before)
    assert main(["lake", "orphans", "--older-than", "0s", "--delete"]) == 0  # what the failed write left, if anything
    assert lake.scan(name).equals(before)


def test_the_commands_speak_json_and_refuse_plainly(lake, home, capsys, monkeypatch):
    monkeypatch.setenv("HEADRACE_HOME", str(home.path))
    land_in_steps(lake, 3)
    assert main(["lake", "compact", "--table", EVENTS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"table": EVENTS, "rows": 15, "files_before": 3, "files_after": 1}]
    assert main(["lake", "expire", "--older-than", "0s", "--dry-run"]) == 0
    assert "lake.events: 3 snapshots" in capsys.readouterr().out
    assert main(["lake", "orphans"]) == 0
    assert capsys.readouterr().out == "0 files, 0 bytes named by no snapshot\n"
    with pytest.raises(HeadraceError, match=r"the lake has no table lake.evnts; it has lake.dead_letters"):
        main(["lake", "compact", "--table", "lake.evnts"])
    with pytest.raises(HeadraceError, match=r"an age is a whole number and one of s, m, h, d.*'a week'"):
        age("a week")
