"""The RisingWave models without RisingWave: compiled by dbt, parsed and checked against what its documentation supports, and
the portable part of the very same text run on a real PostgreSQL beside DuckDB."""

import json
import re

import duckdb
import numpy as np
import pytest
import sqlglot
from sqlglot import expressions as exp

from streaming_sql.block_views import BlockViews
from streaming_sql.tick_news import SUBSCRIPTION
from tests.streaming_sql.generated import alive as living
from tests.streaming_sql.generated import as_table, typed
from tests.streaming_sql.postgres import postgres
from tests.streaming_sql.risingwave_functions import FUNCTIONS, KEYWORDS, OPERATORS
from tests.warehouse.dbt_command import try_dbt
from tests.warehouse.test_dbt_project import copied  # noqa: F401
from warehouse.events import EVENT_TYPES, EVENTS_SCHEMA, RETRACTION
from warehouse.features.declarations import load_groups
from warehouse.features.oracle import Read, values
from warehouse.features.render import block_sql, retracted_sql, retractions_sql, staging_sql
from warehouse.home import REPOSITORY, Home
from warehouse.time_algebra import DAY_US, DUPLICATE_MEMORY_US, FIVE_MINUTES_US, FURTHEST_AHEAD_US, SECOND_US, closed_tick

GROUPS = load_groups()
STAGING = ["stg_engagements", "stg_retractions", "stg_retracted_events"]
VIEWS = ["arrivals", "closed_tick", "newest_arrivals", *STAGING, *GROUPS, "user_sequences"]
SLIDING = "note_engagement_sliding_1h"
SINKS = [f"{name}_to_lake" for name in GROUPS]
SUBSCRIPTIONS = [*(f"{name}_changes" for name in GROUPS), SUBSCRIPTION]
START_US = 1_651_766_400_000_000
PLACE_IN_LOG = ("landed_at", "log_partition", "log_offset")
FIELDS_OF_LOG = [name for name in EVENTS_SCHEMA.names if name not in (*PLACE_IN_LOG, "landing")]


def compile_models(home, *more, project=REPOSITORY):
    """`dbt compile` with no server to talk to."""
    words = ["compile", "--target", "risingwave", "--no-introspect", "--no-populate-cache"]
    return try_dbt(
        Home(home),
        *words,
        "--select",
        "streaming_sql",
        *more,
        project=project,
        DBT_PROFILES_DIR=str(REPOSITORY),
        RISINGWAVE_PORT="1",
    )


def compiled_texts(home, project):
    """Model's name -> its text, of a project that compiles."""
    done = compile_models(home, project=project)
    assert done.returncode == 0, done.stdout
    folder = home / "dbt" / "target" / "compiled" / "headrace" / "streaming_sql" / "models" / "streaming_sql"
    return {path.stem: path.read_text() for path in folder.glob("*.sql")}


@pytest.fixture
def compiled_with(tmp_path):
    return lambda variables: compile_models(tmp_path, "--vars", variables)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    done = compile_models(home)
    assert done.returncode == 0, done.stdout
    return json.loads((home / "dbt" / "target" / "manifest.json").read_text())


@pytest.fixture(scope="module")
def compiled(manifest):
    """Model name → compiled SQL."""
    models = [node for node in manifest["nodes"].values() if node["resource_type"] == "model"]
    assert {node["original_file_path"].split("/")[0] for node in models} == {"streaming_sql"}  # batch twins are off
    return {node["name"]: node["compiled_code"] for node in models if node.get("compiled_code")}


def test_every_group_of_the_batch_side_has_a_view_from_the_same_declaration(compiled):
    assert set(compiled) == {"log_events", *VIEWS, SLIDING, *SINKS, *SUBSCRIPTIONS}
    for name, group in GROUPS.items():
        for measure in group.measures:
            assert re.search(rf"as {measure.name}(__sum)?\b", compiled[name]), (name, measure.name)


def test_a_changed_view_is_replaced_beside_the_one_that_answers(manifest):
    for name in (*STAGING, *GROUPS, "closed_tick", "user_sequences", SLIDING, *SINKS):
        assert manifest["nodes"][f"model.headrace.{name}"]["config"]["zero_downtime"] == {"enabled": True}


@pytest.mark.parametrize("name", [*VIEWS, SLIDING, *SINKS])
def test_the_sql_parses_as_risingwave_and_uses_only_what_it_documents(compiled, name):
    tree = sqlglot.parse_one(compiled[name], dialect="risingwave")
    assert not list(tree.find_all(exp.Command, exp.Qualify))
    without_text = re.sub(r"'[^']*'", "''", compiled[name].lower())
    called = set(re.findall(r"([a-z_]+)\s*\(", without_text)) - KEYWORDS
    assert called <= FUNCTIONS
    assert set(re.findall(r"->>|->|::|~|@>|//|<@", without_text)) <= OPERATORS


def test_the_events_table_is_append_only_over_kafka_with_the_logs_own_time_and_place(compiled):
    text = compiled["log_events"].lower()
    for clause in (
        "append only",
        "include timestamp as kafka_timestamp",
        "include partition as kafka_partition",
        "include offset as kafka_offset",
        "connector = 'kafka'",
        "format plain encode json",
    ):
        assert clause in text


def a_log(seed, size=2500):
    """Late, dead, duplicated, retracted, tied and null events and heartbeats in two partitions."""
    rng = np.random.default_rng(seed)
    now_us, offsets, records = START_US, [0, 0], []
    ages = [0, 0, 1, SECOND_US, FIVE_MINUTES_US, 3 * DAY_US, DUPLICATE_MEMORY_US, DUPLICATE_MEMORY_US + 1]
    ages += [-SECOND_US, -FURTHEST_AHEAD_US, -FURTHEST_AHEAD_US - 1]
    for number in range(size):
        now_us += int(rng.choice([0, 1, 7 * SECOND_US, 90 * SECOND_US]))
        partition = int(rng.integers(2))
        watch = [None, 5, -3, "12", "x", True][rng.integers(6)]
        event_ts = now_us - int(rng.choice(ages))
        event_type = str(rng.choice([*EVENT_TYPES, "heartbeat", "click", "click", "click", RETRACTION]))
        records.append(
            {
                "event_id": f"e{number if rng.random() < 0.8 else rng.integers(number + 1)}",
                "event_type": event_type,
                "retracts": f"e{rng.integers(max(number - 100, 0), number + 20)}" if event_type == RETRACTION else None,
                "user_id": [None, "u1", "u2", "ü3"][rng.integers(4)],
                "note_id": [None, "n1", "n2", "N1"][rng.integers(4)],
                "author_id": [None, "a1", "a2"][rng.integers(3)],
                "event_ts": event_ts if rng.random() < 0.5 else event_ts // FIVE_MINUTES_US * FIVE_MINUTES_US,
                "landed_at": now_us,
                "log_partition": partition,
                "log_offset": offsets[partition],
                "landing": "log",
                "properties": None if watch is None and rng.random() < 0.5 else json.dumps({"watch_ms": watch}),
            }
        )
        offsets[partition] += 1
    return records


NOW = "now() - interval '45 days'"
"""The temporal filter's edge, which these logs of 2022 lie before."""


def create_views(connection, compiled, kind="view", forgotten="timestamptz '2000-01-01'", names=VIEWS):
    """The views in their order; what landed at or before `forgotten` (SQL) has left them."""
    for name in names:
        own = "view" if name == "arrivals" else kind
        connection.execute(f"create {own} {name} as {compiled[name].replace(NOW, forgotten)}")


def create_log_events(connection):
    """The Kafka table as a plain one: the connector is the only part of it that PostgreSQL does not have."""
    types = {"event_ts": "timestamptz", "properties": "jsonb"}
    columns = ", ".join(f"{name} {types.get(name, 'varchar')}" for name in FIELDS_OF_LOG)
    connection.execute(
        f"create table log_events ({columns}, kafka_timestamp timestamptz, kafka_partition varchar, kafka_offset varchar)"
    )


def load_into_postgres(connection, events):
    create_log_events(connection)
    copy_into_log(connection, events)


def rows_for_log(events):
    """As `log_events` has their columns: partition and offset are texts there."""
    for row in events.select([*FIELDS_OF_LOG, *PLACE_IN_LOG]).to_pylist():
        yield [str(value) if name.startswith("log_") else value for name, value in row.items()]


def copy_into_log(connection, events):
    with connection.cursor().copy("copy log_events from stdin") as copy:
        for row in rows_for_log(events):
            copy.write_row(row)


def rows_of(cursor):
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def instant_us(value):
    return round(value.timestamp() * 1_000_000)


def comparable(rows):
    """Lists in one shape: PostgreSQL holds them newest first as JSON, DuckDB oldest first as structs."""
    out = []
    for row in rows:
        row = dict(row)
        for name, value in row.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                row[name] = sorted((entry["event_id"], entry["value"]) for entry in value)
        out.append(row)
    return sorted(out, key=lambda row: json.dumps(row, default=str, sort_keys=True))


def assert_newest(stream, records):
    """Of each partition, `newest_arrivals` has the last event that is no dead letter."""
    newest = {r["log_partition"]: r for r in living(records) if r["event_type"] != "heartbeat"}
    for row in rows_of(stream.execute("select * from newest_arrivals")):
        expected = newest.pop(row["log_partition"])
        assert {**row, "landed_at": instant_us(row["landed_at"])} == {name: expected[name] for name in row}
    assert newest == {}


@pytest.mark.parametrize("seed", [1, 2])
def test_postgres_runs_the_very_text_and_agrees_with_duckdb_to_the_bit(compiled, seed):
    events = as_table(a_log(seed))
    alive = f"landed_at - event_ts between to_microseconds({-FURTHEST_AHEAD_US}) and to_microseconds({DUPLICATE_MEMORY_US})"
    batch = duckdb.connect()
    batch.execute("set TimeZone = 'UTC'")
    batch.register("events", events)
    batch.execute(f"create table landed as select * from events where {alive}")
    batch.execute(f"create table staged as {staging_sql('landed')}")
    batch.execute(f"create table retractions as {retractions_sql('landed')}")
    batch.execute(f"create table retracted as {retracted_sql('staged', 'retractions')}")
    with postgres("dev") as stream:
        load_into_postgres(stream, events)
        create_views(stream, compiled, "materialized view")

        for mine, name, least in zip(STAGING, ("staged", "retractions", "retracted"), (200, 50, 20), strict=True):
            expected = comparable(rows_of(batch.execute(f"from {name}")))
            assert comparable(rows_of(stream.execute(f"select * from {mine}"))) == expected, mine
            assert len(expected) > least, mine
        for name, group in GROUPS.items():
            expected = comparable(rows_of(batch.execute(block_sql(group, "staged", "retracted"))))
            assert comparable(rows_of(stream.execute(f"select * from {name}"))) == expected, name
            assert len(expected) > 100
            assert any(row["is_rebuilt"] for row in expected)

        [tick] = rows_of(stream.execute("select * from closed_tick"))
        newest = [instant_us(max(r["landed_at"] for r in events.to_pylist() if r["log_partition"] == p)) for p in (0, 1)]
        assert instant_us(tick["closed_tick"]) == closed_tick(newest)

        assert_newest(stream, a_log(seed))

        for row in rows_of(stream.execute("select * from user_sequences")):
            expected = batch.execute(
                "select event_ts, event_id, note_id from staged anti join retracted using (log_partition, log_offset) "
                "where user_id = ? and event_type = 'click' and note_id is not null order by event_ts, event_id",
                [row["user_id"]],
            ).fetchall()[-50:]
            assert list(zip(row["event_ts"], row["event_ids"], row["items"], strict=True)) == expected
            assert len(expected) == 50


def test_what_landed_long_ago_leaves_every_view_and_the_rest_stays_as_it_is(compiled):
    assert compiled["arrivals"].count(NOW) == 1
    records = a_log(4, 1200)
    edge_us = records[600]["landed_at"]
    kept = [record for record in records if record["landed_at"] > edge_us]
    rows = {}
    for log, forgotten in ((records, f"to_timestamp({edge_us} / 1000000.0)"), (kept, "timestamptz '2000-01-01'")):
        with postgres("dev") as stream:
            load_into_postgres(stream, as_table(log))
            create_views(stream, compiled, forgotten=forgotten)
            rows[len(log)] = {name: comparable(rows_of(stream.execute(f"select * from {name}"))) for name in VIEWS}
    assert rows[len(records)] == rows[len(kept)]
    assert len(rows[len(kept)]["note_engagement"]) > 50


def test_a_window_longer_than_the_views_keep_is_refused(compiled_with):
    done = compiled_with("{stream_keep_days: 30}")
    assert done.returncode != 0
    assert "stream_keep_days: must be at least 38 (the longest window, 30 days" in done.stdout


def test_a_silent_partition_leaves_no_tick(compiled):
    records = [record for record in a_log(3, 50) if record["log_partition"] == 0]
    with postgres("dev") as stream:
        load_into_postgres(stream, as_table(records))
        create_views(stream, compiled, names=("arrivals", "closed_tick"))
        assert rows_of(stream.execute("select * from closed_tick")) == []


def test_what_a_server_asks_of_a_reader_is_one_statement_that_risingwave_documents():
    names = tuple(name for name, group in GROUPS.items() if group.keys[0] == "user_id")
    sql = BlockViews(GROUPS).of_reader_sql(names)
    tree = sqlglot.parse_one(sql.replace("%s", "null"), dialect="risingwave")
    assert {table.name for table in tree.find_all(exp.Table)} == {"closed_tick", *names}
    assert set(re.findall(r"([a-z_]+)\s*\(", re.sub(r"'[^']*'", "''", sql))) - KEYWORDS <= FUNCTIONS
    assert sql.count("%s") == 4 * len(names)


def test_every_view_that_servers_look_up_by_key_has_an_index_on_it(manifest):
    for name, group in {**GROUPS, "user_sequences": GROUPS["user_activity"]}.items():
        assert manifest["nodes"][f"model.headrace.{name}"]["config"]["indexes"] == [{"columns": list(group.keys)}]


@pytest.mark.parametrize("name", list(GROUPS))
def test_a_sink_appends_to_a_table_of_its_own_in_the_lakes_catalogue(manifest, name):
    config = manifest["nodes"][f"model.headrace.{name}_to_lake"]["config"]
    assert (config["materialized"], config["connector"]) == ("sink", "iceberg")
    parameters = config["connector_parameters"]
    assert (parameters["type"], parameters["force_append_only"]) == ("append-only", "true")
    assert (parameters["database.name"], parameters["table.name"]) == ("stream", name)


def test_sinks_write_each_row_of_closed_ticks_once_whatever_comes_later(compiled):
    records = a_log(6, 1200)
    written = []
    for size in (800, 1200):
        with postgres("dev") as stream:
            load_into_postgres(stream, as_table(records[:size]))
            create_views(stream, compiled)
            [tick] = rows_of(stream.execute("select * from closed_tick"))
            sunk = {name: comparable(rows_of(stream.execute(compiled[f"{name}_to_lake"]))) for name in GROUPS}
            for name in GROUPS:
                there = stream.execute(f"select count(*) from {name} where known_at <= %s", [tick["closed_tick"]]).fetchone()
                assert (len(sunk[name]),) == there
            written.append(sunk)
    for name in GROUPS:
        assert len(written[1][name]) > len(written[0][name]) > 20
        assert all(row in written[1][name] for row in written[0][name]), name


def test_a_sliding_hour_is_what_a_read_at_its_end_finds_as_corrected(compiled):
    """HOP, which RisingWave alone has, as a join with the twelve steps of each event's hour; the rest is the very text."""
    hop = "hop(standing_events, event_ts, interval '5 minutes', interval '3600' second)"
    assert compiled[SLIDING].count(hop) == 1
    steps = (
        "(select came.*, date_bin(interval '5 minutes', came.event_ts, timestamptz '1970-01-01 00:00:00+00') "
        "+ (step * interval '5 minutes') as window_end "
        "from standing_events as came cross join generate_series(1, 12) as steps(step)) as hops"
    )
    records = a_log(8, 1200)
    with postgres("dev") as stream:
        load_into_postgres(stream, as_table(records))
        create_views(stream, compiled)
        found = rows_of(stream.execute(compiled[SLIDING].replace(hop, steps)))
    group, later_us = GROUPS["note_engagement"], records[-1]["landed_at"] + 10 * DAY_US
    events = [typed(record) for record in living(records)]
    for row in sorted(found, key=lambda row: (row["note_id"], row["window_end"]))[:: len(found) // 40]:
        end_us = instant_us(row["window_end"])
        expected = values(group, events, Read((row["note_id"],), end_us, end_us, later_us))
        for name in ("num_views", "num_clicks", "num_long_views"):
            assert row[name] == expected[f"note_{name}_1h"], (row, name)
    assert len(found) > 200


SESSIONS = """version: 2
models:
  - name: sessions
    config:
      meta:
        features:
          entity: user
          events: stg_engagements
          keys: [user_id]
          measures:
            - name: num
              aggregation: count
              where: event_type = 'click'
              windows: [{kind: session, gap: 5m}, {kind: session, gap: 1h}, 1d]
            - {name: ms, aggregation: sum, of: watch_ms, windows: [{kind: session, gap: 10m}]}
            - {name: most, aggregation: max, of: watch_ms, windows: [{kind: session, gap: 15m}]}
            - {name: mean, aggregation: avg, of: watch_ms, windows: [{kind: session, gap: 5m}]}
"""


def test_sessions_in_the_stream_are_those_of_a_read_while_they_are_on(copied, tmp_path):  # noqa: F811
    (copied / "warehouse" / "models" / "blocks" / "sessions.yml").write_text(SESSIONS)
    models = copied / "streaming_sql" / "models" / "streaming_sql"
    (models / "sessions.sql").write_text(
        "{{ session_windows(feature_group('sessions'), ref('stg_engagements'), ref('stg_retracted_events')) }}\n"
    )
    compiled = compiled_texts(tmp_path / "home", copied)
    assert isinstance(sqlglot.parse_one(compiled["sessions"], dialect="risingwave"), exp.Union)
    records = a_log(9, 900)
    with postgres("dev") as stream:
        load_into_postgres(stream, as_table(records))
        create_views(stream, compiled, names=("arrivals", *STAGING))
        found = rows_of(stream.execute(compiled["sessions"]))
    group = load_groups(copied)["sessions"]
    later_us = records[-1]["landed_at"] + 10 * DAY_US
    events = [typed(record) for record in living(records)]
    compared = 0
    for row in found:
        start_us, end_us = instant_us(row["session_start"]), instant_us(row["session_end"])
        gap = int(row["session_gap"].total_seconds() // 60)
        if end_us - start_us > DAY_US:  # further than a reader looks back
            continue
        key = tuple(row[name] for name in group.keys)
        read = Read(key, end_us, end_us, later_us)
        [name] = {f"{row['measure']}_session_{gap}m", f"{row['measure']}_session_{gap // 60}h"} & {
            f"{measure.name}_{window.name}" for measure in group.measures for window in measure.windows
        }
        assert row["value"] == pytest.approx(values(group, events, read)[f"{group.entity}_{name}"], rel=1e-12), row
        compared += 1
    assert compared > 50
