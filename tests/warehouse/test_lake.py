"""The lake: made once, written whole or not at all, readable by any engine, and not a way to the rest of the disk."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from subprocess import PIPE
from threading import Barrier

import duckdb
import pyarrow as pa
import pytest
from pyiceberg.catalog.sql import SqlCatalog

from warehouse.errors import HeadraceError, disk_full_said
from warehouse.events import TIMESTAMP
from warehouse.home import REPOSITORY, Home
from warehouse.lake import CATALOGUE, Lake, stored_bytes

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("seen_at", TIMESTAMP),
        pa.field("events", pa.list_(pa.struct([("event_ts", TIMESTAMP), ("value", pa.string())]))),
    ]
)
APPEND = """
import sys
from tests.warehouse.test_lake import rows
from warehouse.home import Home
from warehouse.lake import Lake
lake = Lake.open(Home.from_env())
for number in range({first}, {first} + 5):
    lake.append("zoo.animals", rows(number))
"""


def rows(*ids: int) -> pa.Table:
    """One row per id, an hour apart from 2026-01-01 on.

    No list is NULL: pyiceberg 0.12 writes a NULL list of structs as an empty one (apache/iceberg-python#3833).
    """
    start = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    return pa.Table.from_pylist(
        [
            {
                "id": number,
                "seen_at": datetime.fromtimestamp(start + 3600 * number, UTC),
                "events": [{"event_ts": datetime(2026, 1, 1, tzinfo=UTC), "value": "a'b"}] if number % 2 else [],
            }
            for number in ids
        ],
        schema=SCHEMA,
    )


def ids(lake: Lake, name: str = "zoo.animals") -> list[int]:
    return sorted(lake.scan(name)["id"].to_pylist())


@pytest.fixture
def animals(lake) -> Lake:
    lake.create("zoo.animals", SCHEMA, {"seen_at": "hour"})
    return lake


def test_creating_twice_keeps_the_first_table_and_its_rows(animals):
    animals.append("zoo.animals", rows(1, 2))
    again = animals.create("zoo.animals", SCHEMA)
    assert again.metadata.table_uuid == animals.table("zoo.animals").metadata.table_uuid
    assert [field.name for field in again.spec().fields] == ["seen_at_hour"]
    assert ids(animals) == [1, 2]
    assert animals.tables() == ["zoo.animals"]


def test_many_may_create_the_same_table_in_a_new_namespace_at_once(lake):
    barrier = Barrier(4)

    def create(name: str) -> str:
        barrier.wait()
        return str(lake.create(name, SCHEMA, {"seen_at": "day"}).metadata.table_uuid)

    with ThreadPoolExecutor(4) as pool:
        for attempt in range(5):
            assert len(set(pool.map(create, [f"zoo{attempt}.animals"] * 4))) == 1


def test_appends_of_two_processes_all_land(animals, home):
    writers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", APPEND.format(first=first)],
            cwd=REPOSITORY,
            env={"HEADRACE_HOME": str(home.path), "PATH": "/usr/bin:/bin"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for first in (0, 100)
    ]
    told = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], told
    assert ids(animals) == [*range(5), *range(100, 105)]


def test_an_append_carries_its_properties_in_the_same_snapshot(animals):
    assert animals.properties("zoo.animals") == {}
    assert animals.properties("zoo.plants") == {}
    animals.append("zoo.animals", rows(1), {"headrace.position": "[1, 2]"})
    assert animals.properties("zoo.animals")["headrace.position"] == "[1, 2]"


def test_replacing_leaves_the_new_rows_alone_and_works_on_an_empty_table(animals):
    animals.replace("zoo.animals", rows(1, 2))
    animals.replace("zoo.animals", rows(3))
    assert ids(animals) == [3]
    with animals.duckdb() as connection:
        assert connection.execute("select id from zoo.animals").fetchall() == [(3,)]


def test_a_transaction_that_raises_leaves_nothing(animals):
    animals.append("zoo.animals", rows(1))
    before = animals.table("zoo.animals").metadata

    def half_a_change() -> None:
        with animals.transaction("zoo.animals") as transaction:
            transaction.append(rows(2))
            transaction.set_properties({"headrace.landed.x": "1"})
            raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        half_a_change()
    assert animals.table("zoo.animals").metadata == before
    assert ids(animals) == [1]
    with animals.transaction("zoo.animals") as transaction:
        transaction.append(rows(2))
        transaction.append(rows(3))
        transaction.set_properties({"headrace.landed.x": "1"})
    after = animals.table("zoo.animals")
    assert ids(animals) == [1, 2, 3]
    assert after.properties["headrace.landed.x"] == "1"
    assert len(after.metadata.metadata_log) == len(before.metadata_log) + 1  # one commit, whatever its steps


def test_rows_of_another_shape_are_refused_and_nothing_lands(animals):
    with pytest.raises(ValueError, match="Mismatch in fields"):
        animals.append("zoo.animals", pa.table({"id": pa.array(["one"])}))
    assert animals.table("zoo.animals").current_snapshot() is None


def test_an_empty_table_is_a_view_with_its_columns_and_types(animals):
    animals.create("zoo.animals_seen", animals.table("zoo.animals").schema())
    animals.append("zoo.animals_seen", rows(1))
    with animals.duckdb() as connection:
        assert connection.execute("select * from zoo.animals").fetchall() == []
        types = [connection.execute(f"describe zoo.{name}").fetchall() for name in ("animals", "animals_seen")]
    assert [row[:2] for row in types[0]] == [row[:2] for row in types[1]]


def test_a_connection_reads_the_snapshot_it_was_opened_on(animals):
    animals.append("zoo.animals", rows(1))
    with animals.duckdb() as connection:
        animals.append("zoo.animals", rows(2))
        assert connection.execute("select count(*) from zoo.animals").fetchall() == [(1,)]
        animals.create_view(connection, "zoo.animals")
        assert connection.execute("select count(*) from zoo.animals").fetchall() == [(2,)]


def test_a_connection_speaks_utc(animals, monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    animals.append("zoo.animals", rows(0))
    with animals.duckdb() as connection:
        assert connection.execute("select seen_at::varchar from zoo.animals").fetchall() == [("2026-01-01 00:00:00+00",)]


def test_a_folder_with_spaces_and_quotes_is_a_folder_like_any_other(tmp_path):
    lake = Lake.open(Home(tmp_path / "o'neill's \"lake\" é"))
    lake.create("zoo.animals", SCHEMA, {"seen_at": "hour"})
    lake.append("zoo.animals", rows(1, 2))
    assert ids(lake) == [1, 2]
    with lake.duckdb(read_only=True) as connection:
        assert connection.execute("select count(*) from zoo.animals").fetchall() == [(2,)]


@pytest.mark.parametrize(
    "statement",
    [
        "select * from read_text('{outside}')",
        "select * from '{outside}'",
        "copy (select 1) to '{outside}.out'",
        "attach '{outside}.db'",
        "install spatial",
        "load spatial",
        "set enable_external_access = true",
        "set allowed_directories = ['/']",
        "reset lock_configuration",
        "select * from glob('{outside}*')",
    ],
)
def test_a_read_only_connection_stays_inside_the_lake(animals, tmp_path, statement):
    animals.append("zoo.animals", rows(1))
    outside = tmp_path / "outside.csv"
    outside.write_text("secret\n1\n")
    with animals.duckdb(read_only=True) as connection:
        with pytest.raises(duckdb.Error, match=r"disabled by configuration|through configuration|locked|does not exist"):
            connection.execute(statement.format(outside=outside))
        assert connection.execute("select id from zoo.animals").fetchall() == [(1,)]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["outside.csv"]


def test_another_engine_reads_the_table_with_nothing_but_the_catalogue(animals):
    animals.append("zoo.animals", rows(1, 2, 3))
    folder = animals.folder
    catalogue = SqlCatalog(CATALOGUE, uri=f"sqlite:///{folder / 'catalogue.db'}", warehouse=f"file://{folder / 'warehouse'}")
    scan = catalogue.load_table("zoo.animals").scan(row_filter="seen_at >= '2026-01-01T02:00:00+00:00'")
    assert scan.to_arrow().sort_by("id").to_pylist() == rows(2, 3).to_pylist()
    assert len(list(scan.plan_files())) == 2  # the hour of the first row is not read
    catalogue.engine.dispose()


def test_a_missing_table_is_named_with_those_that_are_there(animals):
    with pytest.raises(HeadraceError, match=r"no table zoo\.plants; it has zoo\.animals"):
        animals.table("zoo.plants")


def test_a_home_that_cannot_be_made_says_what_to_set(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(HeadraceError, match=r"cannot make the folder .*file/lake \(Not a directory\); point HEADRACE_HOME"):
        Lake.open(Home(tmp_path / "file"))


def test_a_catalogue_that_is_no_database_is_said_to_be(home):
    (home.lake / "catalogue.db").write_text("this is no SQLite file, it only has its name" * 50)
    with pytest.raises(HeadraceError, match=r"cannot open the lake's catalogue in .*: .*not a database"):
        Lake.open(home)


def test_processes_that_make_the_catalogue_at_one_moment_all_open_it(tmp_path):
    script = (
        "import sys; from pathlib import Path; from warehouse.home import Home; from warehouse.lake import Lake\n"
        "print('ready', flush=True)\n"
        "for path in sys.stdin: print(Lake.open(Home(Path(path.strip()))).tables(), flush=True)"
    )
    opener = partial(subprocess.Popen, [sys.executable, "-c", script], cwd=REPOSITORY, text=True, stdin=PIPE, stdout=PIPE)
    with opener() as one, opener() as other, opener() as third:
        processes = [one, other, third]
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
        for round in range(20):
            for process in processes:
                process.stdin.write(f"{tmp_path / str(round)}\n")
                process.stdin.flush()
            assert [process.stdout.readline() for process in processes] == ["[]\n"] * 3
        for process in processes:
            process.stdin.close()


def test_a_full_disk_is_said_in_one_sentence_however_deep_it_was_met(tmp_path):
    def fail() -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("write failed") from error

    with pytest.raises(HeadraceError, match=f"no space is left on the disk of {tmp_path}"), disk_full_said(tmp_path):
        fail()
    with pytest.raises(ZeroDivisionError), disk_full_said(tmp_path):
        raise ZeroDivisionError


def test_stored_bytes_counts_what_the_lake_occupies(animals):
    before = stored_bytes(animals.folder)
    animals.append("zoo.animals", rows(1))
    assert stored_bytes(animals.folder) > before > 0
    assert stored_bytes(animals.folder / "nowhere") == 0


def extensions(connection) -> set[str]:
    return {row[0] for row in connection.execute("select extension_name from duckdb_extensions() where loaded").fetchall()}


def test_a_reader_reads_plain_files_without_the_iceberg_extension_and_changed_tables_with_it(lake):
    lake.create("a.plain", pa.schema([("x", pa.int64())]))
    lake.append("a.plain", pa.table({"x": [1, 2]}))
    lake.create("a.empty", pa.schema([("x", pa.int64())]))
    with lake.reader(["a.plain", "a.empty"]) as connection:
        assert connection.execute("select x from a.plain union all select x from a.empty order by x").fetchall() == [(1,), (2,)]
        assert "iceberg" not in extensions(connection)
    with lake.table("a.plain").update_schema() as update:
        update.rename_column("x", "y")
    lake.append("a.plain", pa.table({"y": [3]}))
    with lake.reader(["a.plain"]) as connection:
        assert connection.execute("select y from a.plain order by y").fetchall() == [(1,), (2,), (3,)]
        assert "iceberg" in extensions(connection)


@pytest.mark.parametrize(
    "opened", [lambda lake: lake.reader(["a.plain"]), lambda lake: lake.duckdb()], ids=["files", "iceberg"]
)
def test_an_asof_join_of_an_arrow_table_is_no_nested_loop(lake, opened):
    lake.create("a.plain", SCHEMA)
    lake.append("a.plain", rows(3))
    asked = pa.table({"id": pa.array(range(1000)), "at": pa.array([0] * 1000, pa.int64()).cast(TIMESTAMP)})
    with opened(lake) as connection:
        connection.register("asked", asked)
        query = "from asked asof left join a.plain as seen on asked.id = seen.id and asked.at >= seen.seen_at"
        how = connection.execute(f"explain {query}").fetchall()[0][1]
    assert "ASOF_JOIN" in how
    assert "NESTED_LOOP" not in how
