"""Events that carry ids only, with what tables of the lake add to them, in every execution against the oracle."""

import contextlib
import json
from bisect import bisect_right
from pathlib import Path
from random import Random

import duckdb
import pyarrow as pa
import pytest
import sqlglot
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming_sql.event_log import EventLog
from streaming_sql.online_store import OnlineStore
from streaming_sql.runner import Runner
from streaming_sql.verify import live_answers
from tests.parity.generated_events import event_log, heartbeats, some_reads
from tests.parity.test_batch_equals_oracle import assert_equal, build, read_batch
from tests.parity.test_dbt_equals_oracle import land
from tests.streaming_sql.postgres import postgres
from tests.streaming_sql.test_risingwave_models import compiled_texts
from tests.warehouse.dbt_command import dbt
from tests.warehouse.test_dbt_project import copied  # noqa: F401
from warehouse.clock import ManualClock
from warehouse.errors import HeadraceError
from warehouse.features import render
from warehouse.features.attributes_oracle import hydrated
from warehouse.features.declarations import load_attributes, load_groups
from warehouse.features.generated import as_table, attribute_tables, generated_tables
from warehouse.features.oracle import values
from warehouse.features.unit import run_unit_tests
from warehouse.features.verify import Verdict, create_tables, in_float64, verify
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import create_tables as create_lake_tables

PROJECT = Path(__file__).parent / "light_events"
LIGHT = PROJECT / "warehouse" / "models" / "light.yml"
GROUPS, ATTRIBUTES = load_groups(PROJECT), load_attributes(PROJECT)
FILLED = ("author_id", "note_kind", "note_length_ms", "author_tier", "author_is_known")
MINUTE_US = 60_000_000
TEN_US = 1_767_261_600_000_000  # 2026-01-01 10:00 UTC


def light_log(random: Random) -> tuple[list[dict], dict[str, list[dict]], list[dict]]:
    """(events as sent, rows of the tables, events with what the tables add)."""
    sent = event_log(random, num_retractions=random.choice((1, 5, 20)))
    for row in sent:
        row["author_id"] = row["author_id"] if random.random() < 0.2 else None
    versions = generated_tables(random, GROUPS.values(), sent)
    return sent, versions, hydrated(sent, ATTRIBUTES, versions)


def staged(events: list[dict], versions: dict[str, list[dict]], dialect: str = "duckdb") -> list[dict]:
    with duckdb.connect() as connection:
        connection.execute("set TimeZone = 'UTC'")
        connection.register("events", as_table(events))
        create_tables(connection, attribute_tables(ATTRIBUTES, versions))
        return connection.execute(render.staging_sql("events", dialect, ATTRIBUTES)).to_arrow_table().to_pylist()


def click(landed_at: int, event_ts: int = TEN_US, **columns) -> dict:
    return {
        **dict.fromkeys(("author_id", "retracts", "properties", "surface", "request_id", "impression_id")),
        **{"event_id": "e", "event_type": "click", "user_id": "u", "note_id": "n", "landing": "log"},
        **{"event_ts": event_ts, "landed_at": landed_at, "log_partition": 0, "log_offset": 0, **columns},
    }


def version(kind: str | None, changed_at: int | None, read_at: int | None = None, **columns) -> dict:
    row = {"id": "n", "author_id": None, "length_ms": None, "kind": kind, "changed_at": changed_at, "read_at": read_at}
    return {**row, **columns}


@pytest.mark.parametrize(
    ("kind", "event_ts", "landed_at", "versions"),
    [
        ("new", TEN_US, TEN_US, [version("old", TEN_US - 99 * MINUTE_US), version("new", TEN_US - 6 * MINUTE_US)]),
        ("old", TEN_US, TEN_US + 6 * MINUTE_US, [version("old", TEN_US - 9 * MINUTE_US), version("new", TEN_US + 1, TEN_US)]),
        ("new", TEN_US, TEN_US + 6 * MINUTE_US, [version("old", TEN_US - 9 * MINUTE_US), version("new", TEN_US, TEN_US)]),
        # 10:06 reads what was known at 10:05: rows that were there before 10:05:30 less the grace of their own tick
        ("x", TEN_US, TEN_US + 6 * MINUTE_US, [version("x", TEN_US - 1, TEN_US + 30_000_000 - 1)]),
        (None, TEN_US, TEN_US + 5 * MINUTE_US, [version("x", TEN_US - 1, TEN_US + 30_000_000)]),
        (None, TEN_US, TEN_US + 6 * MINUTE_US, [version("late", TEN_US - 1, TEN_US + 6 * MINUTE_US)]),
        # read much later than it happened: a late event finds what a punctual one did not
        ("late", TEN_US, TEN_US + 90 * MINUTE_US, [version("late", TEN_US - 1, TEN_US + 6 * MINUTE_US)]),
        # a version corrected afterwards, and one that says nothing
        ("b", TEN_US, TEN_US + 90 * MINUTE_US, [version("a", TEN_US - 1, TEN_US + 1), version("b", TEN_US - 1, TEN_US + 2)]),
        (None, TEN_US, TEN_US, [version("a", TEN_US - 99 * MINUTE_US), version(None, TEN_US - 50 * MINUTE_US)]),
        (None, TEN_US, TEN_US, [version("a", None, TEN_US - 99 * MINUTE_US), version("other", 0, id="m")]),
    ],
)
def test_an_event_has_the_version_of_its_time_that_was_known_when_it_landed(kind, event_ts, landed_at, versions):
    events, tables = [click(landed_at, event_ts)], {"outside.note_versions": versions, "outside.author_versions": []}
    assert hydrated(events, ATTRIBUTES, tables)[0]["note_kind"] == kind
    assert staged(events, tables)[0]["note_kind"] == kind


def test_what_an_event_carries_wins_and_a_later_table_looks_up_by_what_an_earlier_one_found():
    long_ago = TEN_US - 99 * MINUTE_US
    authors = [{"author_id": a, "since": long_ago, "tier": t, "is_known": None} for a, t in (("a", 1), ("b", 2))]
    tables = {"outside.note_versions": [version("k", long_ago, author_id="a")], "outside.author_versions": authors}
    for carried, author_id, tier in ((None, "a", 1), ("b", "b", 2), ("c", "c", None)):
        [found] = staged([click(TEN_US, author_id=carried)], tables)
        assert (found["author_id"], found["author_tier"], found["note_kind"]) == (author_id, tier, "k")


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_staging_gives_every_event_what_the_oracle_does(seed):
    sent, versions, rows = light_log(Random(seed))
    expected = {(row["log_partition"], row["log_offset"]): row for row in rows}
    found = staged(sent, versions)
    assert len(found) > 40
    for row in found:
        wanted = expected[row["log_partition"], row["log_offset"]]
        assert {name: row[name] for name in FILLED} == {name: wanted[name] for name in FILLED}
    assert 0 < sum(row["note_kind"] is not None for row in found) < len(found)


@pytest.mark.parametrize("name", list(GROUPS))
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32))
def test_batch_equals_the_equation(name, seed):
    random, group = Random(seed), GROUPS[name]
    sent, versions, rows = light_log(random)
    questions = some_reads(random, group, rows)
    with duckdb.connect() as connection:
        create_tables(connection, attribute_tables(ATTRIBUTES, versions))
        build(connection, group, as_table(sent))
        answers = read_batch(connection, group, questions)
    for read, answer in zip(questions, answers, strict=True):
        for feature, value in values(group, rows, read).items():
            assert_equal(answer[feature], value, (feature, read))


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32))
def test_the_live_store_equals_the_equation(seed):
    random = Random(seed)
    sent, versions, rows = light_log(random)
    asked = set()
    for name, read, answer in live_answers(GROUPS, sent, random, attribute_tables(ATTRIBUTES, versions)):
        asked.add(name)
        for feature, value in values(GROUPS[name], rows, read).items():
            assert_equal(answer[feature], in_float64(value), (feature, read))
    assert asked == set(GROUPS)


def test_verify_takes_light_events_through_batch_compute_and_stream():
    verdicts = {name: Verdict(name) for name in GROUPS}
    for seed in (1, 2):
        assert list(verify(GROUPS, seed, 2000, verdicts, others={"live store": live_answers})) == list(GROUPS)
    for verdict in verdicts.values():
        assert verdict.agrees, verdict.differences
        assert set(verdict.compared) == {"batch SQL", "compute", "live store"}
        assert verdict.not_empty > 20


def test_a_unit_test_gives_the_tables_rows():
    [(test, failures)] = run_unit_tests(GROUPS, PROJECT)
    assert failures == []
    assert isinstance(attribute_tables(ATTRIBUTES, test.tables)["outside.note_versions"], pa.Table)


def declare(project: Path) -> None:
    """The project of this folder in a copy of the repository's: attributes, their tables, and the models of one group."""
    models = project / "warehouse" / "models"
    light, staging = (yaml.safe_load(path.read_text()) for path in (LIGHT, models / "staging" / "_staging.yml"))
    [declared] = [model for model in light["models"] if model["name"] == "stg_engagements"]
    [staged_model] = [model for model in staging["models"] if model["name"] == "stg_engagements"]
    staged_model["config"] = declared["config"]
    there = {column["name"] for column in staged_model["columns"]}
    staged_model["columns"] += [column for column in declared["columns"] if column["name"] not in there]
    (models / "staging" / "_staging.yml").write_text(yaml.safe_dump(staging, sort_keys=False))
    light["models"] = [model for model in light["models"] if model["name"] == "light_authors"]
    (models / "blocks" / "light.yml").write_text(yaml.safe_dump(light, sort_keys=False))
    (models / "blocks" / "light_authors.sql").write_text(
        "-- depends_on: {{ ref('stg_engagements') }}\n{{ feature_blocks('light_authors') }}\n"
    )
    for model in ("stg_engagements", "stg_shadowed_arrivals"):
        path = models / "staging" / f"{model}.sql"
        reads = "".join(
            f"-- depends_on: {{{{ source('outside', '{name}') }}}}\n" for name in ("note_versions", "author_versions")
        )
        path.write_text(reads + path.read_text())


def test_dbt_stages_in_steps_what_the_oracle_says_and_blocks_follow(copied, tmp_path):  # noqa: F811
    declare(copied)
    home = Home(tmp_path / "home")
    lake = Lake.open(home)
    sent, versions, rows = light_log(Random(5))
    sent += heartbeats(sent, max(row["landed_at"] for row in sent) + 2 * 24 * 60 * MINUTE_US)
    for relation, table in attribute_tables(ATTRIBUTES, versions).items():
        lake.create(relation, table.schema)
    given = {relation: 0 for relation in versions}
    ordered = {
        relation: sorted(found, key=lambda row: row.get("read_at") or row.get("changed_at") or row.get("since") or 0)
        for relation, found in versions.items()
    }
    for first, last in ((0, 40), (40, len(sent))):
        land(lake, sent[first:last])
        until = max(row["landed_at"] for row in sent[:last])
        for relation, found in ordered.items():  # a row is there when it says so, and not before
            times = [row.get("read_at") or row.get("changed_at") or row.get("since") or 0 for row in found]
            due = bisect_right(times, until)
            new = {relation: found[given[relation] : due]}
            lake.append(relation, attribute_tables(ATTRIBUTES, new)[relation])
            given[relation] = due
        dbt(home, "run", "--quiet", "--select", "+light_authors", project=copied)
    expected = {(row["log_partition"], row["log_offset"]): row for row in rows}
    with lake.duckdb() as connection, duckdb.connect() as other:
        built = connection.execute("from staging.stg_engagements").to_arrow_table()
        retracted = connection.execute("from staging.stg_retracted_events").to_arrow_table()
        blocks = sorted(map(str, connection.execute("select * from features.light_authors").fetchall()))
        other.execute("set TimeZone = 'UTC'")
        other.register("staged", built)
        other.register("retracted", retracted)
        assert blocks == sorted(
            map(str, other.execute(render.block_sql(GROUPS["light_authors"], "staged", "retracted")).fetchall())
        )
    assert built.num_rows > 40
    assert len(blocks) > 10
    for row in built.to_pylist():
        wanted = expected[row["log_partition"], row["log_offset"]]
        assert {name: row[name] for name in FILLED} == {name: wanted[name] for name in FILLED}


def test_a_running_server_reads_a_table_again_and_a_restart_sees_the_same(tmp_path):
    clock = ManualClock(TEN_US + 40_000_000)
    lake = Lake.open(Home(tmp_path))
    create_lake_tables(lake)
    for relation, table in attribute_tables(ATTRIBUTES, {}).items():
        lake.create(relation, table.schema)

    def versions(*rows: dict) -> None:
        lake.append(
            "outside.note_versions", attribute_tables(ATTRIBUTES, {"outside.note_versions": rows})["outside.note_versions"]
        )

    def started() -> Runner:
        runner = Runner(lake, log, OnlineStore(GROUPS), GROUPS, clock)
        runner.catch_up()
        return runner

    def clicks(runner: Runner, kind: str) -> float:
        return float(runner.store.view().assemble("light_kinds", [(kind,)], clock.now_us() + 1).values[0, 0])

    log = EventLog.open(tmp_path / "log", clock=clock)
    with contextlib.closing(log):
        runner = started()
        number = 0
        for kind in ("old", "new"):
            versions(version(kind, TEN_US - MINUTE_US + (0 if kind == "old" else MINUTE_US), clock.now_us()))
            counted = []
            for _ in range(2):  # before the tick of its arrival is closed a row is not known
                event = {"event_id": f"e{number}", "event_type": "click", "user_id": "u", "note_id": "n"}
                log.append([event | {"event_ts": clock.now_us()}])
                number += 1
                runner.step()
                assert clicks(started(), kind) == clicks(runner, kind)
                counted.append(clicks(runner, kind))
                clock.advance_us(5 * MINUTE_US)
            assert counted == [0.0, 1.0]
        lake.catalogue.drop_table("outside.note_versions")
        with pytest.raises(
            HeadraceError, match=r"light\.yml:\d+: the lake has no table outside\.note_versions; land or build it"
        ):
            started()


def test_postgres_stages_light_events_as_duckdb_does():
    sent, versions, _ = light_log(Random(11))
    tables = attribute_tables(ATTRIBUTES, versions)
    with duckdb.connect() as batch, postgres("dev") as stream:
        batch.execute("set TimeZone = 'UTC'")
        batch.register("events", as_table(sent))
        create_tables(batch, tables)
        stream.execute("create schema outside")
        for relation in ("events", *tables):
            kinds = [
                (row[0], row[1].replace("TIMESTAMP WITH TIME ZONE", "timestamptz"))
                for row in batch.execute(f"describe {relation}").fetchall()
            ]
            stream.execute(f"create table {relation} ({', '.join(f'{name} {kind}' for name, kind in kinds)})")
            with stream.cursor().copy(f"copy {relation} from stdin") as copy:
                for row in batch.execute(f"from {relation}").fetchall():
                    copy.write_row(row)
        sql = render.staging_sql("events", "risingwave", ATTRIBUTES)
        assert not list(sqlglot.parse_one(sql, dialect="risingwave").find_all(sqlglot.exp.Command))
        found, expected = stream.execute(sql), batch.execute(render.staging_sql("events", attributes=ATTRIBUTES))
        assert [column[0] for column in found.description] == [column[0] for column in expected.description]
        place = [column[0] for column in found.description].index("log_partition")
        rows = [sorted(cursor.fetchall(), key=lambda row: row[place : place + 2]) for cursor in (found, expected)]
        assert rows[0] == rows[1]
        assert len(rows[0]) > 40


ENTRY = {"from": "outside.t", "keys": ["note_id"], "valid_from": "since", "columns": ["kind"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keys": []}, "keys is missing; an entry has from, keys, valid_from and columns"),
        ({"at": 1}, r"unknown settings \['at'\]; allowed are"),
        ({"from": "outside.u"}, "outside.u is no source table or model of this project; describe it under `sources` first"),
        (
            {"valid_from": "until"},
            "outside.t has no column until; the columns described beside it are author_id, kind, note_id, since",
        ),
        ({"keys": {"kind": "note_id"}}, "events are looked up by kind, which they do not have; use user_id, note_id"),
        ({"columns": ["watch_ms"]}, "outside.t has no column watch_ms"),
        ({"columns": {"watch_ms": "kind"}}, "watch_ms is the event's own or made by staging"),
        ({"columns": {"size": "kind"}}, "size is not described among the columns of stg_engagements; add"),
        (
            {"columns": {"at": "kind"}},
            "at needs a data_type among the columns of stg_engagements: varchar, bigint.* got timestamptz",
        ),
        ({"columns": {"note_id": "kind"}}, "note_id is looked up by itself"),
        ({"columns": {"author_id": "kind"}}, "author_id is text in the log; its data_type is varchar, not bigint"),
        ({"columns": "kind"}, "columns is a list of columns, or a mapping"),
    ],
)
def test_a_declaration_with_an_error_is_refused_with_its_line(tmp_path, change, said):
    with pytest.raises(HeadraceError, match=rf"^warehouse/models/x\.yml:12: attributes: {said}"):
        load_attributes(project_with(tmp_path, [{**ENTRY, **change}]))


def test_what_is_declared_twice_or_elsewhere_is_refused(tmp_path):
    with pytest.raises(HeadraceError, match=r"x\.yml:13: attributes: kind is filled twice; an event has one value of it"):
        load_attributes(project_with(tmp_path, [ENTRY, ENTRY]))
    with pytest.raises(
        HeadraceError, match=r"x\.yml:7: attributes belong to stg_engagements, which stages events, not to other"
    ):
        load_attributes(project_with(tmp_path, [ENTRY], model="other"))


def project_with(folder: Path, entries: list[dict], model: str = "stg_engagements") -> Path:
    (folder / "warehouse" / "models").mkdir(parents=True, exist_ok=True)
    listed = "\n".join(f"          - {json.dumps(entry)}" for entry in entries)
    (folder / "warehouse" / "models" / "x.yml").write_text(
        "version: 2\nsources:\n  - name: outside\n    tables:\n"
        "      - {name: t, columns: [{name: note_id}, {name: kind}, {name: since}, {name: author_id}]}\n"
        f"models:\n  - name: {model}\n    description: staged\n    config:\n      meta:\n        attributes:\n{listed}\n"
        "    columns: [{name: note_id, data_type: varchar}, {name: kind, data_type: varchar}, {name: watch_ms}, "
        "{name: at, data_type: timestamptz}, {name: author_id, data_type: bigint}]\n"
    )
    return folder


def test_on_risingwave_the_staging_view_joins_models_over_the_lakes_tables(copied, tmp_path):  # noqa: F811
    declare(copied)
    stream = copied / "streaming_sql" / "models" / "streaming_sql"
    tables = ("note_versions", "author_versions")
    for name in tables:
        (stream / f"{name}.sql").write_text(
            f"{{{{ config(materialized='source') }}}}\n\n{{{{ lake_source('outside', '{name}') }}}}\n"
        )
    staging = stream / "stg_engagements.sql"
    staging.write_text("".join(f"-- depends_on: {{{{ ref('{name}') }}}}\n" for name in tables) + staging.read_text())
    (stream / "light_authors.sql").write_text(
        "{{ block_rows(feature_group('light_authors'), ref('stg_engagements'), ref('stg_retracted_events')) }}\n"
    )
    compiled = compiled_texts(tmp_path / "home", copied)
    assert "connector = 'iceberg'" in compiled["note_versions"]
    assert "table.name = 'note_versions'" in compiled["note_versions"]
    expected = render.staging_sql('"dev"."public"."arrivals"', "risingwave", ATTRIBUTES)
    for name in tables:
        expected = expected.replace(f"outside.{name}", f'"dev"."public"."{name}"')
    assert "".join(compiled["stg_engagements"].partition("with arrivals")[1:]).split() == expected.split()
    assert "note_length_ms" in compiled["light_authors"]
