import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from warehouse.datasets import kuairand
from warehouse.datasets.base import DATASET_EVENTS_SCHEMA
from warehouse.errors import HeadraceError
from warehouse.home import data_root
from warehouse.time_algebra import FURTHEST_AHEAD_US, HOUR_US

FOLDER = data_root() / "kuairand"
needs_the_data = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"KuaiRand is not in the data root {data_root()} (set HEADRACE_DATA)"
)


@pytest.fixture(scope="module")
def dataset():
    return kuairand.load(FOLDER)


@pytest.fixture(scope="module")
def query(dataset):
    with duckdb.connect() as connection:
        for name in ("events", "notes", "users"):
            connection.register(name, getattr(dataset, name))
        for name in ("impressions", "videos", "user_history"):
            connection.register(f"source_{name}", pq.read_table(FOLDER / f"{name}.parquet"))
        connection.register("source_users", pq.read_table(FOLDER / "users.parquet"))
        yield lambda sql: connection.execute(sql).fetchall()


@needs_the_data
def test_events_have_the_shape_of_the_lake(dataset):
    assert dataset.events.schema == DATASET_EVENTS_SCHEMA


@needs_the_data
def test_a_second_load_gives_the_same_data_set(dataset):
    again = kuairand.load(FOLDER)
    assert (again.events, again.notes, again.users) == (dataset.events, dataset.notes, dataset.users)


@needs_the_data
@pytest.mark.parametrize(("event_type", "column"), list(kuairand.FLAG_COLUMNS.items()))
def test_there_is_one_event_per_flag_that_is_set(query, event_type, column):
    ((expected,),) = query(f"select sum({column}) from source_impressions")
    assert query(f"select count(*) from events where event_type = '{event_type}'") == [(expected,)]


@needs_the_data
def test_there_is_one_view_per_row_and_repeated_rows_stay(query):
    assert query("select count(*), count(distinct event_id) from events where event_type = 'view'") == query(
        "select count(*), count(distinct (user_id, video_id, time_ms)) from source_impressions"
    )


@needs_the_data
def test_watch_events_add_up_to_the_play_time_of_the_source(query):
    assert query("select count(*), sum((properties ->> 'watch_ms')::bigint) from events where event_type = 'watch'") == query(
        "select count(*), sum(play_time_ms) from source_impressions where play_time_ms > 0"
    )


@needs_the_data
def test_a_view_happens_when_the_source_says_so(query):
    assert query("select min(epoch_us(event_ts)), max(epoch_us(event_ts)) from events where event_type = 'view'") == query(
        "select min(time_ms) * 1000, max(time_ms) * 1000 from source_impressions"
    )


@needs_the_data
def test_surface_and_author_come_from_the_source(query):
    assert query("""
        select count(*)
        from source_impressions as impressions
        inner join source_videos as videos on impressions.video_id = videos.video_id
        anti join events
            on events.event_id = format('view:{}-{}-{}', impressions.user_id, impressions.video_id, impressions.time_ms)
            and events.surface = 'tab_' || impressions.tab
            and events.author_id = videos.author_id::varchar
    """) == [(0,)]


@needs_the_data
def test_history_has_no_requests(query):
    assert query("select count(request_id) from events") == [(0,)]


@needs_the_data
def test_arrival_is_plausible(query):
    ((ahead, late, most_ahead_us, most_late_us),) = query("""
        with delays as (select epoch_us(landed_at) - epoch_us(event_ts) as delay_us from events)

        select
            avg((delay_us < 0)::int),
            avg((delay_us > 60 * 1000000)::int),
            max(-delay_us),
            max(delay_us)
        from delays
    """)
    assert ahead == pytest.approx(0.001, abs=0.0003)
    assert late == pytest.approx(0.0105, abs=0.002)
    assert most_ahead_us < FURTHEST_AHEAD_US
    assert 2 * HOUR_US < most_late_us <= 30 * HOUR_US


@needs_the_data
def test_everything_landed_by_the_second_tick_after_the_last_view(query):
    assert query("select max(landed_at) = timestamptz '2022-05-05 16:05:00+00' from events") == [(True,)]


@needs_the_data
def test_notes_are_the_videos(query):
    assert query("""
        select
            count(*),
            count(distinct note_id),
            count(*) filter (where created_at is null),
            count(*) filter (where len(topics) = 0)
        from notes
    """) == query("select count(*), count(*), 0, count(*) filter (where tag is null) from source_videos")


@needs_the_data
def test_tags_become_topics_in_their_order(query):
    assert query("""
        select count(*)
        from notes
        inner join source_videos as videos on notes.note_id = videos.video_id::varchar
        where array_to_string(notes.topics, ',') != coalesce(videos.tag, '')
    """) == [(0,)]


@needs_the_data
def test_a_user_registered_so_many_days_before_the_log_starts(query):
    assert query("""
        select count(*), count(*) filter (
            where
            epoch_us(users.created_at)
            != (select min(time_ms) * 1000 from source_impressions) - source_users.register_days * 86400000000
        )
        from users
        inner join source_users on users.user_id = source_users.user_id::varchar
    """) == query("select count(*), 0 from source_users")


@needs_the_data
def test_histories_keep_their_order(query):
    assert query("""
        select count(*) filter (where users.history_note_ids != source.watch_seq::varchar[]),
            count(*) filter (where users.history_liked_note_ids != source.like_seq::varchar[]),
            count(*)
        from users
        inner join source_user_history as source on users.user_id = source.user_id::varchar
    """) == query("select 0, 0, count(*) from source_user_history")


@needs_the_data
def test_attributes_are_json_without_nulls(query):
    assert query("""
        select
            count(*) filter (where attributes ->> 'user_active_degree' is null),
            count(*) filter (where attributes like '%null%')
        from users
    """) == [(0, 0)]


# Bad input: a folder of four tiny files, each time with one thing wrong.

IMPRESSION = dict.fromkeys(kuairand.SOURCE_SCHEMAS["impressions.parquet"].names, 0) | {"user_id": 1, "video_id": 2}


def tiny_table(name: str) -> pa.Table:
    schema = kuairand.SOURCE_SCHEMAS[name]
    if name == "impressions.parquet":
        return pa.Table.from_pylist(
            [IMPRESSION | {"time_ms": 1_650_812_741_436, "is_click": 1, "play_time_ms": 900}], schema=schema
        )
    ids = {"user_id": 1, "video_id": 2, "register_days": 10, "tag": "3, 4"}
    return pa.Table.from_pylist([{field: ids.get(field) for field in schema.names}], schema=schema)


@pytest.fixture
def folder(tmp_path):
    for name in kuairand.SOURCE_SCHEMAS:
        pq.write_table(tiny_table(name), tmp_path / name)
    return tmp_path


def refused(folder, *fragments: str) -> None:
    with pytest.raises(HeadraceError) as error:
        kuairand.load(folder)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_a_tiny_folder_loads(folder):
    dataset = kuairand.load(folder)
    assert set(dataset.events["event_id"].to_pylist()) == {
        f"{event_type}:1-2-1650812741436" for event_type in ("view", "click", "watch")
    }
    assert dataset.notes["topics"].to_pylist() == [["3", "4"]]
    assert dataset.notes["duration_ms"].to_pylist() == [None]
    assert dataset.users["attributes"].to_pylist() == ["{}"]


def test_a_missing_folder_is_named(tmp_path):
    refused(tmp_path / "nowhere", "nowhere does not exist", "HEADRACE_DATA")


@pytest.mark.parametrize("name", list(kuairand.SOURCE_SCHEMAS))
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refused(folder, f"{name} does not exist")


@pytest.mark.parametrize("name", list(kuairand.SOURCE_SCHEMAS))
def test_a_file_that_is_not_parquet_is_named(folder, name):
    (folder / name).write_bytes(b"user_id,video_id\n1,2\n")
    refused(folder, name, "cannot be read as Parquet")


def test_a_truncated_file_is_named(folder):
    whole = (folder / "videos.parquet").read_bytes()
    (folder / "videos.parquet").write_bytes(whole[: len(whole) // 2])
    refused(folder, "videos.parquet", "cannot be read as Parquet")


def test_a_folder_in_the_place_of_a_file_is_named(folder):
    (folder / "users.parquet").unlink()
    (folder / "users.parquet").mkdir()
    refused(folder, "users.parquet does not exist")


def test_missing_columns_are_named_beside_those_that_are_there(folder):
    pq.write_table(tiny_table("impressions.parquet").drop_columns(["is_click", "tab"]), folder / "impressions.parquet")
    refused(folder, "impressions.parquet lacks the column(s)", "is_click", "tab", "it has user_id")


@pytest.mark.parametrize(
    ("column", "values", "fragment"),
    [
        ("time_ms", pa.array(["yesterday"]), "must hold int64, got string"),
        ("time_ms", pa.array([None], pa.int64()), "1 of 1 values are NULL"),
        ("is_like", pa.array([2]), "must be 0 or 1, got 2 to 2"),
        ("play_time_ms", pa.array([-1]), "must not be negative, got -1"),
    ],
)
def test_a_column_with_wrong_values_is_named(folder, column, values, fragment):
    table = tiny_table("impressions.parquet")
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, values), folder / "impressions.parquet")
    refused(folder, f"impressions.parquet, column {column}", fragment)


def test_a_log_without_rows_is_refused(folder):
    pq.write_table(tiny_table("impressions.parquet").slice(0, 0), folder / "impressions.parquet")
    refused(folder, "impressions.parquet has no rows")
