import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from warehouse.home import Home
from warehouse.lake import Lake

SCHEMA = pa.schema([pa.field("at", pa.timestamp("us", tz="UTC"), nullable=False), pa.field("n", pa.int64())])
DAYS = [datetime.datetime(2022, 4, day, 12, tzinfo=datetime.UTC) for day in (8, 9)]


def rows(*numbers, day=0):
    return pa.table({"at": [DAYS[day]] * len(numbers), "n": numbers}, schema=SCHEMA)


@pytest.fixture
def lake(tmp_path):
    lake = Lake.open(Home(tmp_path))
    lake.create("lake.parts", SCHEMA, {"at": "day"})
    return lake


def files(lake):
    return sorted(lake.folder.rglob("parts/data/**/*.parquet"))


def numbers(lake, *filters):
    return sorted(lake.scan("lake.parts", *filters)["n"].to_pylist())


def test_parts_of_one_partition_are_row_groups_of_one_file(lake):
    writer = lake.file_writer("lake.parts")
    writer.write(rows(1, 2))
    writer.write(rows(3))
    writer.write(rows(None, 9))
    assert lake.scan("lake.parts").num_rows == 0
    lake.add_files("lake.parts", writer.close())
    (file,) = files(lake)
    assert pq.ParquetFile(file).num_row_groups == 3
    assert lake.scan("lake.parts").to_pylist() == pa.concat_tables([rows(1, 2), rows(3), rows(None, 9)]).to_pylist()
    (entry,) = lake.table("lake.parts").inspect.files().to_pylist()
    of_n = entry["readable_metrics"]["n"]
    assert (entry["record_count"], of_n["null_value_count"], of_n["lower_bound"], of_n["upper_bound"]) == (5, 1, 1, 9)
    assert numbers(lake, "n > 2") == [3, 9]
    assert lake.duckdb().execute("select count(*), sum(n) from lake.parts").fetchone() == (5, 15)


def test_another_partition_is_another_file_also_where_a_part_is_of_both(lake):
    writer = lake.file_writer("lake.parts")
    for part in (rows(1), rows(2, day=1), pa.concat_tables([rows(3), rows(4, day=1)]), rows(5, day=1)):
        writer.write(part)
    lake.add_files("lake.parts", writer.close())
    assert numbers(lake) == [1, 2, 3, 4, 5]
    assert numbers(lake, "at >= '2022-04-09T00:00:00+00:00'") == [2, 4, 5]


def test_a_file_is_ended_once_it_is_large(lake, monkeypatch):
    monkeypatch.setattr("warehouse.file_writer._LARGE", rows(1, 2, 3).nbytes)
    writer = lake.file_writer("lake.parts")
    for part in (rows(1, 2), rows(3), rows(4), rows(), rows(5, 6, 7, 8)):
        writer.write(part)
    lake.add_files("lake.parts", writer.close())
    assert sorted(pq.read_metadata(file).num_rows for file in files(lake)) == [1, 3, 4]
    assert numbers(lake) == [*range(1, 9)]


def test_what_is_discarded_leaves_no_file(lake):
    writer = lake.file_writer("lake.parts")
    writer.write(rows(1))
    writer.write(rows(2, day=1))
    assert len(files(lake)) == 2
    writer.discard()
    assert files(lake) == []
    assert writer.close() == []


def test_columns_that_the_table_lacks_are_refused_and_what_was_written_stays(lake):
    writer = lake.file_writer("lake.parts")
    writer.write(rows(1))
    with pytest.raises(ValueError, match="n"):
        writer.write(pa.table({"at": [DAYS[0]], "n": ["one"]}))
    lake.add_files("lake.parts", writer.close())
    assert numbers(lake) == [1]
