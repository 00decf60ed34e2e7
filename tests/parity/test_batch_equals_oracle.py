"""Batch SQL (blocks, roll-ups, point-in-time reads) against the oracle, on generated events."""

from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity.generated_events import as_table, event_logs, instants
from warehouse.features import render
from warehouse.features.declarations import FeatureGroup, load_groups
from warehouse.features.oracle import Read, values
from warehouse.time_algebra import FIVE_MINUTES_US, newest_tick

EVERYTHING = Path(__file__).parent / "every_aggregation"
GROUPS = {**load_groups(), **load_groups(EVERYTHING)}
KEYS = {
    ("note_id",): [("1",), ("12",), ("é",), ("",), ("nobody",), (None,)],
    ("author_id",): [("1",), ("é",)],
    ("user_id",): [("1",), ("12",), ("é",), ("",), ("nobody",)],
    ("user_id", "author_id"): [("1", "23"), ("12", "12"), ("1", "12"), ("12", "1"), ("é", "1"), ("1", None)],
}


@st.composite
def reads(draw: st.DrawFn, group: FeatureGroup) -> list[Read]:
    questions = []
    for key in draw(st.lists(st.sampled_from(KEYS[group.keys]), min_size=1, max_size=4)):
        request_us = draw(instants(days=10))
        tick_us = newest_tick(request_us) - draw(st.sampled_from((0, 0, 0, 1, 12))) * FIVE_MINUTES_US
        known_tick_us = tick_us + draw(st.sampled_from((0, 0, 0, -1, 1, 300))) * FIVE_MINUTES_US
        questions.append(Read(key, request_us, tick_us, known_tick_us))
    return questions


def build(connection: duckdb.DuckDBPyConnection, group: FeatureGroup, events: pa.Table) -> None:
    connection.execute("set TimeZone = 'UTC'")
    connection.register("events", events)
    connection.execute(f"create or replace table staged as {render.staging_sql('events')}")
    connection.execute(f"create or replace table blocks as {render.block_sql(group, 'staged')}")
    connection.execute(f"create or replace table hours as {render.roll_up_sql(group, 'blocks', 60)}")
    connection.execute(f"create or replace table days as {render.roll_up_sql(group, 'hours', 1440)}")


def spine_table(group: FeatureGroup, questions: list[Read]) -> pa.Table:
    def times(found: list[int]) -> pa.Array:
        return pa.array(found, pa.int64()).cast(pa.timestamp("us", "UTC"))

    columns = {key: pa.array([read.key[at] for read in questions], pa.string()) for at, key in enumerate(group.keys)}
    return pa.table(
        {
            "row_id": pa.array(range(len(questions)), pa.int64()),
            **columns,
            "request_ts": times([read.request_us for read in questions]),
            "feature_watermark": times([read.tick_us for read in questions]),
            "known_at": times([read.known_tick_us for read in questions]),
            "known_position": pa.array([read.known_position for read in questions], pa.list_(pa.int64())),
        }
    )


def read_batch(connection: duckdb.DuckDBPyConnection, group: FeatureGroup, questions: list[Read]) -> list[dict]:
    connection.register("spine", spine_table(group, questions))
    sql = render.point_in_time_sql(group, "spine", "blocks", "hours", "days", "staged")
    return sorted(connection.execute(sql).to_arrow_table().to_pylist(), key=lambda row: row["row_id"])


@pytest.mark.parametrize("name", list(GROUPS))
@settings(max_examples=40)
@given(data=st.data())
def test_blocks_and_reads_equal_the_equation(name, data):
    group = GROUPS[name]
    events = data.draw(event_logs())
    questions = data.draw(reads(group))
    with duckdb.connect() as connection:
        build(connection, group, as_table(events))
        answers = read_batch(connection, group, questions)
    assert len(answers) == len(questions)
    for read, answer in zip(questions, answers, strict=True):
        expected = values(group, events, read)
        for feature, value in expected.items():
            got = answer[feature]
            if isinstance(value, list):
                assert (got or []) == value, (feature, read)
            elif isinstance(value, float):
                assert got == pytest.approx(value, rel=1e-12), (feature, read)
            else:
                assert got == value, (feature, read)
