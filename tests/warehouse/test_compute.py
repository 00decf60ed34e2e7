"""`headrace features compute | verify`: the same rows in the same order, values worked out by hand, a sentence on bad input."""

import json
import re
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.cli import main
from tests.warehouse.test_cli import small_disk  # noqa: F401
from warehouse.errors import HeadraceError
from warehouse.events import EVENTS_SCHEMA, TIMESTAMP
from warehouse.features import compute_cli, render, verify
from warehouse.features.compute import compute
from warehouse.features.compute_source import RETRACTIONS, SHADOWED, Relations
from warehouse.features.declarations import ALLOWED_FUNCTIONS, load_groups
from warehouse.features.measures import AGGREGATIONS, Measure
from warehouse.home import REPOSITORY, Home
from warehouse.lake import BUILT_UNTIL, Lake

TEN = datetime(2026, 1, 1, 10, tzinfo=UTC)
BUILT = TEN + timedelta(hours=4)
EVENTS = [  # note, event_type, minute of the event, minutes until it landed, watch_ms
    ("n1", "view", 0, 0, None),
    ("n1", "view", 2, 0, None),
    ("n1", "click", 3, 0, None),
    ("n1", "watch", 4, 0, 700),
    ("n1", "click", 4, 30, None),  # late: known from 10:35 on
    ("n2", "view", 61, 0, None),
]


def at(minutes: float) -> datetime:
    return TEN + timedelta(minutes=minutes)


def rows_of_the_log() -> pa.Table:
    rows = []
    for number, (note, kind, minute, delay, watch_ms) in enumerate(sorted(EVENTS, key=lambda event: event[2] + event[3])):
        rows.append(
            {
                **dict.fromkeys(EVENTS_SCHEMA.names),
                "event_id": f"e{number}",
                "event_type": kind,
                "user_id": "u1",
                "note_id": note,
                "author_id": "a1",
                "event_ts": at(minute),
                "landed_at": at(minute + delay),
                "log_partition": 0,
                "log_offset": number,
                "landing": "log",
                "properties": None if watch_ms is None else json.dumps({"watch_ms": watch_ms}),
            }
        )
    return pa.Table.from_pylist(rows, schema=EVENTS_SCHEMA)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Home:
    """A lake with staging and the blocks of all groups, by the macros that dbt runs, built until 14:00."""
    home = Home(tmp_path_factory.mktemp("built"))
    lake = Lake.open(home)

    def store(name: str, sql: str) -> None:
        with lake.duckdb() as connection:
            connection.register("log", rows_of_the_log())
            rows = connection.execute(sql).to_arrow_table()
        table = lake.create(name, rows.schema)
        with table.transaction() as transaction:
            transaction.append(rows)
            transaction.set_properties({BUILT_UNTIL: (BUILT + timedelta(minutes=5)).isoformat()})

    store("staging.stg_engagements", render.staging_sql("log"))
    store(SHADOWED, render.shadowed_sql("log"))
    store(RETRACTIONS, render.retractions_sql("log"))
    store(verify.RETRACTED, render.retracted_sql("staging.stg_engagements", RETRACTIONS))
    for group in load_groups().values():
        names = Relations.of(group)
        store(names.blocks, render.block_sql(group, names.events, verify.RETRACTED))
        store(names.hours, render.roll_up_sql(group, names.blocks, 60))
        store(names.days, render.roll_up_sql(group, names.hours, 1440))
    return home


@pytest.fixture
def folder(built, monkeypatch) -> Home:
    monkeypatch.setenv("HEADRACE_HOME", str(built.path))
    return built


def spine(*rows: tuple[str, datetime], **columns: list) -> pa.Table:
    return pa.table(
        {
            "note_id": pa.array([note for note, _ in rows]),
            "request_ts": pa.array([when for _, when in rows], TIMESTAMP),
            **columns,
        }
    )


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["features", "compute", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("headrace features: ")
    return printed.err.removeprefix("headrace features: ").strip()


def nothing_left(home: Home, out: Path) -> None:
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir() if path.name.endswith(".part")] == []
    assert list(home.tmp.iterdir()) == []


def test_rows_keep_their_order_duplicates_and_extra_columns(folder):
    given = spine(
        ("n2", at(70)),
        ("n1", at(10)),
        ("nobody", at(10)),
        ("n1", at(10)),
        ("n1", at(40)),
        label=[1, 2, 3, 4, 5],
        note=["a"] * 5,
    )
    answer = compute(
        Lake.open(folder), given, ["note_num_clicks_1h", "note_ctr_1h", "note_max_watch_ms_1d", "note_avg_watch_ms_1d"]
    )
    assert answer.select(given.column_names).equals(given)
    assert answer.column_names[len(given.column_names) :] == [
        "note_num_clicks_1h", "note_ctr_1h", "note_max_watch_ms_1d", "note_avg_watch_ms_1d",
    ]  # fmt: skip
    assert answer["note_num_clicks_1h"].to_pylist() == [0, 1, 0, 1, 2]  # the late click counts from 10:35 on
    assert answer["note_ctr_1h"].to_pylist() == [0.0, 0.5, None, 0.5, 1.0]  # nothing over nothing is NULL
    assert answer["note_max_watch_ms_1d"].to_pylist() == [None, 700, None, 700, 700]
    assert answer["note_avg_watch_ms_1d"].to_pylist() == [None, 700.0, None, 700.0, 700.0]
    assert [answer.schema.field(name).type for name in answer.column_names[4:]] == [
        pa.int64(), pa.float64(), pa.int64(), pa.float64(),
    ]  # fmt: skip


def test_known_at_reads_the_past_as_corrected(folder):
    given = spine(("n1", at(10)), ("n1", at(10)), ("n1", at(10)), known=pa.array([at(5), at(30), at(35)], TIMESTAMP))
    answer = compute(Lake.open(folder), given, ["note_num_clicks_1h"], known_at="known")
    assert answer["note_num_clicks_1h"].to_pylist() == [1, 1, 2]


def test_the_request_itself_and_what_has_not_landed_are_not_seen(folder):
    given = pa.table(
        {
            "user_id": ["u1"] * 5,
            "request_ts": pa.array([at(2), at(2) + timedelta(microseconds=1), at(4.5), at(34), at(34.1)], TIMESTAMP),
        }
    )
    answer = compute(Lake.open(folder), given, ["user_num_clicks_1h", "user_num_views_1h", "user_last_clicks_30d"])
    assert answer["user_num_views_1h"].to_pylist() == [1, 2, 2, 2, 2]
    assert answer["user_num_clicks_1h"].to_pylist() == [0, 0, 1, 1, 2]
    assert answer["user_last_clicks_30d"].to_pylist() == [[], [], ["n1"], ["n1"], ["n1", "n1"]]
    assert answer.schema.field("user_last_clicks_30d").type == pa.list_(pa.string())


def test_without_names_every_feature_whose_keys_are_there_is_computed(folder):
    group = load_groups()["note_engagement"]
    assert tuple(compute(Lake.open(folder), spine(("n1", at(10)))).column_names[2:]) == group.feature_names


def test_chunks_change_nothing(folder, monkeypatch, tmp_path):
    given = spine(*[(f"n{number % 3}", at(number)) for number in range(200)])
    pq.write_table(given, tmp_path / "spine.parquet")
    whole = compute(Lake.open(folder), given)
    monkeypatch.setattr("warehouse.features.compute_spine.Spine.chunks.__defaults__", (None, 7))
    assert compute(Lake.open(folder), given).combine_chunks().equals(whole.combine_chunks())
    out = tmp_path / "out.parquet"
    num_rows, _ = compute_cli.compute_file(folder, tmp_path / "spine.parquet", out)
    assert num_rows == 200
    assert pq.read_table(out).equals(whole)


def test_parquet_csv_and_sql_spines_give_the_same_features(folder, tmp_path, capsys):
    given = spine(("n1", at(10)), ("n1", at(40)), ("007", at(40)), x=[1, 2, 3])
    pq.write_table(given, tmp_path / "spine.parquet")
    (tmp_path / "spine.csv").write_text(
        "note_id,request_ts,x\nn1,2026-01-01T10:10:00Z,1\nn1,2026-01-01 12:40:00+02:00,2\n007,2026-01-01T10:40:00Z,3\n"
    )
    query = (
        "select note_id, request_ts::timestamptz as request_ts, x from (values ('n1', '2026-01-01 10:10:00+00', 1), "
        "('n1', '2026-01-01 10:40:00+00', 2), ('007', '2026-01-01 10:40:00+00', 3)) as t(note_id, request_ts, x)"
    )
    found = []
    for words in (["--spine", f"{tmp_path}/spine.parquet"], ["--spine", f"{tmp_path}/spine.csv"], ["--spine-sql", query]):
        out = tmp_path / "out.parquet"
        assert main(["features", "compute", *words, "--out", str(out), "--features", "note_num_clicks_1h,note_ctr_1h"]) == 0
        assert capsys.readouterr().out.startswith(f"3 rows with 2 features in {out} (")
        found.append(pq.read_table(out).to_pylist())
    assert found[0] == found[1] == found[2]
    assert found[0][2] == {"note_id": "007", "request_ts": at(40), "x": 3, "note_num_clicks_1h": 0, "note_ctr_1h": None}
    assert list(folder.tmp.iterdir()) == []


def test_json_says_what_was_computed_and_what_was_left_out(folder, tmp_path, capsys):
    pq.write_table(spine(("n1", at(10))), tmp_path / "spine.parquet")
    words = ["--spine", f"{tmp_path}/spine.parquet", "--out", f"{tmp_path}/out.parquet", "--json"]
    assert main(["features", "compute", *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_rows"] == 1
    assert told["features"] == list(load_groups()["note_engagement"].feature_names)
    assert told["left_out"] == ["author_engagement", "user_activity", "user_author_affinity"]


BAD_SPINES = {
    "no rows": (spine(), "spine.parquet has no rows"),
    "a null key": (spine(("n1", at(0))).set_column(0, "note_id", pa.array([None], pa.string())), "row 1: note_id is null"),
    "a null time": (spine(("n1", at(0)), ("n1", None)), "row 2: request_ts is null"),
    "no zone": (
        pa.table({"note_id": ["n1"], "request_ts": pa.array([datetime(2026, 1, 1)], pa.timestamp("us"))}),
        "request_ts is a timestamp without a zone; write it with one",
    ),
    "text for a time": (
        pa.table({"note_id": ["n1"], "request_ts": ["2026-01-01T00:00:00Z"]}),
        "request_ts is string; write it as",
    ),
    "no time": (pa.table({"note_id": ["n1"]}), "has no column request_ts; it has note_id"),
    "no keys": (pa.table({"x": [1]}), "the spine holds no group's keys (note_engagement: note_id; "),
    "a key that is no id": (
        pa.table({"note_id": [1.5], "request_ts": pa.array([TEN], TIMESTAMP)}),
        "key note_id is double; keys are text",
    ),
    "half a microsecond": (
        pa.table({"note_id": ["n1"], "request_ts": pa.array([1_767_225_600_000_000_500], pa.timestamp("ns", "UTC"))}),
        "request_ts does not fit whole microseconds",
    ),
    "the far future": (
        spine(("n1", at(0)), ("n1", datetime(2999, 1, 1, tzinfo=UTC))),
        "features.note_engagement is built until 2026-01-01T14:00:00Z: ask for request_ts before 2026-01-01T14:05:30Z",
    ),
    "a column that would be overwritten": (
        spine(("n1", at(0)), note_ctr_1d=[1.0]),
        "already has a column note_ctr_1d; rename it",
    ),
}


@pytest.mark.parametrize("case", list(BAD_SPINES))
def test_a_bad_spine_is_refused_with_a_sentence_and_nothing_is_written(folder, tmp_path, capsys, case):
    table, sentence = BAD_SPINES[case]
    pq.write_table(table, tmp_path / "spine.parquet")
    out = tmp_path / "out.parquet"
    assert sentence in refused(capsys, "--spine", f"{tmp_path}/spine.parquet", "--out", str(out))
    nothing_left(folder, out)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--features", "note_ctr_9d"], "no feature 'note_ctr_9d'; see `headrace features list`"),
        (["--features", "note_ctr_1d,note_ctr_1d"], "note_ctr_1d is asked for twice"),
        (["--features", ","], "no features are asked for"),
        (["--features", "user_num_views_1d"], "has no column user_id; it has note_id, request_ts, known"),
        (["--known-at", "then"], "has no column then; it has note_id, request_ts, known"),
        (
            ["--known-at", "known"],
            "known 2026-01-01T10:02:00Z is no tick; ticks are whole 5 minutes, for instance 2026-01-01T10:00:00Z",
        ),
    ],
)
def test_bad_names_are_refused(folder, tmp_path, capsys, words, sentence):
    pq.write_table(spine(("n1", at(0)), known=pa.array([at(2)], TIMESTAMP)), tmp_path / "spine.parquet")
    out = tmp_path / "out.parquet"
    assert sentence in refused(capsys, "--spine", f"{tmp_path}/spine.parquet", "--out", str(out), *words)
    nothing_left(folder, out)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("gone.parquet", None, "no file "),
        ("spine.txt", b"x", "--spine must end in .parquet or .csv"),
        ("spine.parquet", b"PAR1 and no more", "cannot be read as Parquet, perhaps it is half-written"),
        (
            "zone.csv",
            b"note_id,request_ts\nn1,2026-01-01T10:00:00Z\nn1,2026-01-01T10:00:00\n",
            "line 3: request_ts '2026-01-01T10:00:00'",
        ),
        ("noon.csv", b"note_id,request_ts\nn1,noonZ\n", "line 2: request_ts 'noonZ' is no time with a zone"),
        ("empty.csv", b"", "empty.csv has no rows"),
        ("ragged.csv", b'note_id,request_ts\n"n1,2026-01-01T10:00:00Z\n', "cannot be read as CSV"),
    ],
)
def test_a_bad_file_is_refused(folder, tmp_path, capsys, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "out.parquet"
    assert sentence in refused(capsys, "--spine", f"{tmp_path}/{name}", "--out", str(out))
    nothing_left(folder, out)


def test_a_file_cut_short_is_refused(folder, tmp_path, capsys):
    path, out = tmp_path / "spine.parquet", tmp_path / "out.parquet"
    pq.write_table(spine(*[(f"n{number}", at(number / 10)) for number in range(1000)]), path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "perhaps it is half-written" in refused(capsys, "--spine", str(path), "--out", str(out))
    nothing_left(folder, out)


@pytest.mark.parametrize(
    "query", ["select 1; select 2", "drop table lake.events", "selec", "select * from read_csv('/etc/passwd')"]
)
def test_a_query_that_is_no_select_over_the_lake_is_refused(folder, tmp_path, capsys, query):
    out = tmp_path / "out.parquet"
    assert refused(capsys, "--spine-sql", query, "--out", str(out)).startswith("--spine-sql")
    nothing_left(folder, out)


def test_an_out_path_that_cannot_be_written_is_refused(folder, tmp_path, capsys):
    path = tmp_path / "spine.parquet"
    pq.write_table(spine(("n1", at(10))), path)
    for out, sentence in (
        (tmp_path / "no folder" / "out.parquet", "there is no folder"),
        (tmp_path / "out.csv", "--out must end in .parquet"),
        (path, "is the spine itself; name another file"),
    ):
        assert sentence in refused(capsys, "--spine", str(path), "--out", str(out))
    assert pq.read_table(path).num_rows == 1


def test_a_full_disk_leaves_the_old_file_and_no_part_of_a_new_one(folder, small_disk, tmp_path, capsys):  # noqa: F811
    disk, resize = small_disk
    rng = np.random.default_rng(3)
    given = spine(*[(f"n{number}", at(number % 90)) for number in rng.integers(0, 1 << 40, 20_000).tolist()])
    pq.write_table(given, tmp_path / "spine.parquet")
    out = disk / "out.parquet"
    out.write_bytes(b"the old one")
    words = ["--spine", f"{tmp_path}/spine.parquet", "--out", str(out)]
    assert refused(capsys, *words) == f"no space is left on the disk of {disk}; {out} was not written"
    assert out.read_bytes() == b"the old one"
    assert [path.name for path in disk.iterdir()] == ["out.parquet"]
    resize("4m")
    assert main(["features", "compute", *words]) == 0
    assert pq.read_table(out).num_rows == 20_000


def test_a_damaged_file_of_the_lake_is_named_and_nothing_is_written(folder, tmp_path, capsys):
    pq.write_table(spine(("n1", at(10))), tmp_path / "spine.parquet")
    words = ["--spine", f"{tmp_path}/spine.parquet", "--out", f"{tmp_path}/out.parquet"]
    (task,) = Lake.open(folder).table("features.note_engagement").scan().plan_files()
    path = Path(task.file.file_path.removeprefix("file://"))
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-100])
        told = refused(capsys, *words)
        assert told.startswith("a file of the lake is damaged or gone: ")
        assert str(path) in told
        path.unlink()
        assert str(path) in refused(capsys, *words)
    finally:
        path.write_bytes(whole)
    nothing_left(folder, tmp_path / "out.parquet")
    assert main(["features", "compute", *words]) == 0


def test_the_guide_names_every_aggregation_setting_and_function():
    guide = (REPOSITORY / "docs" / "features.md").read_text()
    for aggregation in AGGREGATIONS:
        assert re.search(rf"^\| (\w+, )*{aggregation}(, \w+)* \|", guide, re.MULTILINE), aggregation
    settings = [field.name for field in fields(Measure)]
    for name in (*settings, "entity", "events", "keys", "derived"):
        assert f"`{name}`" in guide, name
    for function in ALLOWED_FUNCTIONS.split():
        assert re.search(rf"[` ]{re.escape(function)}[` ]", guide), function


def test_a_lake_that_is_not_built_is_refused(lake):
    with pytest.raises(HeadraceError, match=r"the lake has no features\.note_engagement yet; run `dbt build` first"):
        compute(lake, spine(("n1", at(10))))


def test_verify_finds_all_equal_on_the_declarations_of_this_project(capsys):
    assert main(["features", "verify", "--seed", "3", "--seeds", "1", "--events", "1000", "--json"]) == 0
    verdicts = {verdict["group"]: verdict for verdict in json.loads(capsys.readouterr().out)}
    assert set(verdicts) == set(load_groups())
    for verdict in verdicts.values():
        assert verdict["compared"] == verdict["equal"]
        assert set(verdict["compared"]) == {"batch SQL", "compute", "live store"}
        assert min(verdict["compared"].values()) > 20
    assert verdicts["note_engagement"]["not_empty"] > 100


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        (
            "block_sql",
            lambda sql: sql.replace("came.known_at as row_known_at", "came.block_start + interval 5 minutes as row_known_at"),
        ),
        ("staging_sql", lambda sql: sql.replace("previous_landed_at is null", "true")),
        ("roll_up_sql", lambda sql: sql.replace("greatest(known_at", "least(known_at")),
        ("point_in_time_sql", lambda sql: sql.replace("> at_upper.block_start", ">= at_upper.block_start")),
    ],
    ids=["late events counted at once", "duplicates kept", "hours known too early", "the block of the tick itself"],
)
def test_verify_finds_a_planted_fault(capsys, monkeypatch, name, plant):
    honest = getattr(render, name)

    def planted(*words, **named):
        sql = honest(*words, **named)
        assert plant(sql) != sql
        return plant(sql)

    monkeypatch.setattr(render, name, planted)
    assert main(["features", "verify", "--seeds", "2", "--events", "1000"]) == 1
    printed = capsys.readouterr().out
    assert "differs: seed 1, " in printed
    assert "the oracle says" in printed


def test_verify_says_which_group_it_cannot_verify(monkeypatch):
    groups = load_groups()
    groups["note_engagement"] = replace(groups["note_engagement"], events="stg_explore")
    verdicts = {name: verify.Verdict(name) for name in groups}
    assert list(verify.verify(groups, 1, 200, verdicts, num_reads=4)) == list(groups)
    assert verdicts["note_engagement"].skipped.startswith("not verified: it reads stg_explore")
    assert not verdicts["note_engagement"].compared
    assert verdicts["author_engagement"].compared
