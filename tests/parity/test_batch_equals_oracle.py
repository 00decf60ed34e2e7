"""Batch SQL (blocks, roll-ups, point-in-time reads) against the oracle, on generated events."""

from pathlib import Path
from random import Random

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity.generated_events import CLOCKS_CHANGE_US, event_log, some_reads, spine_table
from warehouse.features import render
from warehouse.features.declarations import FeatureGroup, load_groups
from warehouse.features.generated import START_US, as_table
from warehouse.features.oracle import Read, values

GROUPS = {**load_groups(), **load_groups(Path(__file__).parent / "every_aggregation")}


def build(connection: duckdb.DuckDBPyConnection, group: FeatureGroup, events: pa.Table) -> None:
    """Staging, 5-minute blocks, hours and days, as dbt builds them."""
    connection.execute("set TimeZone = 'UTC'")
    connection.execute("set threads = 1")  # a second one has nothing to do on so few rows, and costs a fifth more
    connection.register("events", events)
    connection.execute(f"create or replace table staged as {render.staging_sql('events', attributes=group.attributes)}")
    connection.execute(f"create or replace table shadowed as {render.shadowed_sql('events', group.attributes)}")
    connection.execute(f"create or replace table retractions as {render.retractions_sql('events')}")
    connection.execute(f"create or replace table retracted as {render.retracted_sql('staged', 'retractions')}")
    connection.execute(f"create or replace table blocks as {render.block_sql(group, 'staged', 'retracted')}")
    connection.execute(f"create or replace table hours as {render.roll_up_sql(group, 'blocks', 60)}")
    connection.execute(f"create or replace table days as {render.roll_up_sql(group, 'hours', 1440)}")


def read_batch(connection: duckdb.DuckDBPyConnection, group: FeatureGroup, questions: list[Read]) -> list[dict]:
    connection.register("spine", spine_table(group, questions))
    sql = render.point_in_time_sql(group, "spine", "blocks", "hours", "days", "staged", "shadowed", "retractions")
    return sorted(connection.execute(sql).to_arrow_table().to_pylist(), key=lambda row: row["row_id"])


def assert_equal(got: object, expected: object, where: object) -> None:
    """Integers and sequences exactly, doubles within 1e-9 relative (1e-12 near zero), NULL as NULL."""
    if isinstance(expected, list):
        assert (got or []) == expected, where
    elif isinstance(expected, dict):
        assert isinstance(got, list)
        assert [entry for entry, _ in got] == list(expected), where
        for (_, number), wanted in zip(got, expected.values(), strict=True):
            assert_equal(number, wanted, where)
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-12), where
    else:
        assert got == expected, where


@pytest.mark.parametrize("name", list(GROUPS))
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32))
def test_blocks_and_reads_equal_the_equation(name, seed):
    random, group = Random(seed), GROUPS[name]
    events = event_log(random, start_us=CLOCKS_CHANGE_US if group.calendar else START_US)
    questions = some_reads(random, group, events)
    with duckdb.connect() as connection:
        build(connection, group, as_table(events))
        answers = read_batch(connection, group, questions)
    assert len(answers) == len(questions)
    for read, answer in zip(questions, answers, strict=True):
        for feature, value in values(group, events, read).items():
            assert_equal(answer[feature], value, (feature, read))
