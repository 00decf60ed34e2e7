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


WORDS = pa.dictionary(pa.int32(), pa.string())
NESTED = pa.list_(
    pa.struct([("note", pa.string()), ("share", pa.map_(pa.string(), pa.float64())), ("by", pa.list_(pa.string()))])
)
CODED = pa.list_(pa.struct([("by", pa.list_(WORDS)), ("note", WORDS), ("share", pa.map_(WORDS, pa.float64()))]))
"""The same in another order, as a table has it to which columns were added."""


@pytest.fixture
def coded_lake(tmp_path):
    lake = Lake.open(Home(tmp_path))
    lake.create("lake.parts", SCHEMA.append(pa.field("of", NESTED)), {"at": "day"})
    return lake


def coded(*numbers, kind=CODED, day=0):
    one = [{"note": "a", "share": [("x", 0.5), ("y", None)], "by": ["u", None]}, {"note": None, "share": None, "by": []}]
    other = [{"note": "b", "share": [("x", 1.0)], "by": ["u"]}]
    of = [(one, other, [])[number % 3] for number in numbers]  # no list is NULL: pyiceberg reads those as empty ones
    return rows(*numbers, day=day).append_column(pa.field("of", kind), pa.array(of, NESTED).cast(kind))


def test_dictionaries_are_read_as_the_texts_that_they_stand_for(coded_lake, caplog):
    as_texts = NESTED.field(0).type
    plain = pa.list_(pa.struct([as_texts.field(name) for name in ("by", "note", "share")]))
    for kind in (CODED, plain, CODED):
        writer = coded_lake.file_writer("lake.parts")
        writer.write(coded(0, 1, 2, kind=kind))
        writer.write(coded(3, 4, 5, kind=kind))
        coded_lake.add_files("lake.parts", writer.close())
    for file in files(coded_lake):
        assert pq.read_schema(file).field("of").type.value_type.field("note").type == pa.string()
    expected = coded(0, 1, 2, 3, 4, 5, kind=NESTED).to_pylist(maps_as_pydicts="strict")
    assert coded_lake.scan("lake.parts").to_pylist(maps_as_pydicts="strict") == 3 * expected
    with coded_lake.duckdb() as connection:
        query = "select n, unnest(of).note, unnest(of).share['x'], unnest(of).by from lake.parts order by all"
        found = connection.execute(query).fetchall()
    per_row = {0: [("a", 0.5, ["u", None]), (None, None, [])], 1: [("b", 1.0, ["u"])]}
    assert sorted(found, key=str) == sorted(((n, *one) for n in (0, 1, 3, 4) for one in per_row[n % 3] * 3), key=str)
    assert not caplog.records  # nothing for an operator to read


def test_texts_of_a_file_of_dictionaries_are_dictionaries_in_it_and_numbers_are_not(coded_lake):
    writer = coded_lake.file_writer("lake.parts")
    writer.write(coded(0, 1, 2))
    coded_lake.add_files("lake.parts", writer.close())
    (file,) = files(coded_lake)
    group = pq.read_metadata(file).row_group(0)
    columns = {column.path_in_schema: column for column in map(group.column, range(group.num_columns))}
    has_dictionary = {path: column.has_dictionary_page for path, column in columns.items()}
    assert has_dictionary == {path: column.physical_type == "BYTE_ARRAY" for path, column in columns.items()}
    assert has_dictionary["of.list.element.share.key_value.key"]
    assert not has_dictionary["of.list.element.share.key_value.value"]


def test_each_batch_of_a_part_may_have_dictionaries_of_its_own(coded_lake):
    lists = [[{"note": f"a{n}", "share": [(f"b{n}", 0.5)], "by": ["a0", f"b{n}"]}] for n in range(4)]
    batches = [rows(n).append_column(pa.field("of", CODED), pa.array([of], NESTED).cast(CODED)) for n, of in enumerate(lists)]
    writer = coded_lake.file_writer("lake.parts")
    writer.write(pa.concat_tables(batches))
    coded_lake.add_files("lake.parts", writer.close())
    found = coded_lake.scan("lake.parts")["of"].to_pylist(maps_as_pydicts="strict")
    assert found == [[{**one, "share": dict(one["share"])} for one in of] for of in lists]


def test_dictionaries_and_texts_do_not_share_a_file(coded_lake):
    writer = coded_lake.file_writer("lake.parts")
    writer.write(coded(1))
    writer.write(coded(2, kind=NESTED))
    writer.write(pa.concat_tables([coded(3), coded(4, day=1)]))
    coded_lake.add_files("lake.parts", writer.close())
    assert len(files(coded_lake)) == 4  # rows of two partitions have files of their own
    expected = [coded(n, kind=NESTED, day=n == 4).to_pylist(maps_as_pydicts="strict") for n in (1, 2, 3, 4)]
    found = coded_lake.scan("lake.parts").to_pylist(maps_as_pydicts="strict")
    assert sorted(found, key=lambda row: row["n"]) == [row for some in expected for row in some]


def test_dictionaries_of_another_kind_than_the_column_are_refused(coded_lake):
    writer = coded_lake.file_writer("lake.parts")
    wrong = rows(1).append_column(pa.field("of", pa.dictionary(pa.int32(), pa.string())), pa.array(["a"]).dictionary_encode())
    with pytest.raises(ValueError, match="of"):
        writer.write(wrong)
    writer.discard()
    assert not files(coded_lake)
