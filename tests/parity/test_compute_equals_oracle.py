"""`compute`, by arrays and by SQL, against the oracle on generated events."""

from dataclasses import replace
from random import Random

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity.generated_events import event_log, some_reads, spine_table
from tests.parity.test_batch_equals_oracle import GROUPS, assert_equal, build
from warehouse.events import TIMESTAMP
from warehouse.features import compute_arrays, compute_spill
from warehouse.features.compute_engine import Engine
from warehouse.features.compute_model import model_chunks
from warehouse.features.compute_plan import plan
from warehouse.features.compute_source import Relations, Source
from warehouse.features.compute_spine import Span, Spine
from warehouse.features.declarations import FeatureGroup
from warehouse.features.generated import START_US, as_table
from warehouse.features.oracle import Read, values
from warehouse.time_algebra import DAY_US, FIVE_MINUTES_US, HOUR_US, newest_tick

RELATIONS = Relations("blocks", "hours", "days", "staged", "shadowed", "retractions")


def spine_of(group: FeatureGroup, questions: list[Read]) -> pa.Table:
    def times(found: list[int]) -> pa.Array:
        return pa.array(found, pa.int64()).cast(TIMESTAMP)

    return pa.table(
        {
            **{key: pa.array([read.key[at] for read in questions], pa.string()) for at, key in enumerate(group.entity_keys)},
            "request_ts": times([read.request_us for read in questions]),
            "corrected_at": times([read.known_tick_us for read in questions]),
        }
    )


def as_spines_ask(random: Random, questions: list[Read]) -> list[Read]:
    """The questions that a spine can put: T is the newest tick, K any tick, no null keys, no log position."""
    asked = []
    for read in questions:
        if None in read.key:
            continue
        tick_us = newest_tick(read.request_us)
        known_us = tick_us + random.choice((0, 0, 0, -1, 1, 12, 300, 3000)) * FIVE_MINUTES_US
        asked.append(replace(read, tick_us=tick_us, known_tick_us=known_us, known_position=None))
    return asked


def answers(
    connection: duckdb.DuckDBPyConnection, group: FeatureGroup, questions: list[Read], arrays: bool, chunk: int = 15
) -> list[dict]:
    """Computed in chunks, so that several pass through the same tables."""
    spine = Spine(spine_of(group, questions), "the spine")
    what = plan({group.name: group}, spine.schema.names, None)
    spine.check_columns(what.keys, "corrected_at", what.features)
    engine = Engine(connection, {group.name: RELATIONS}, what, spine.span(what.keys, "corrected_at"), arrays=arrays)
    found = [engine.columns(spine.reads(part, what.keys, "corrected_at")) for part in spine.chunks(rows=chunk)]
    return [row for columns in found for row in pa.table(columns).to_pylist()]


def assert_answers(group: FeatureGroup, events: list[dict], questions: list[Read], found: list[dict]) -> None:
    assert len(found) == len(questions)
    for read, answer in zip(questions, found, strict=True):
        for feature, value in values(group, events, read).items():
            assert_equal(answer[feature], value, (feature, read))


def assert_alike(found: list[dict], expected: list[dict]) -> None:
    """Doubles within rounding: engines add them up in any order."""
    for got, wanted in zip(found, expected, strict=True):
        assert got.keys() == wanted.keys()
        for feature, value in wanted.items():
            assert_equal(got[feature], value, feature)


@pytest.mark.parametrize(
    ("name", "by_sql"),
    [
        ("everything", {"sum_double"}),
        ("moments_and_events", {"var_ms", "dev_ms", "distinct_users"}),
        ("maps", {measure.name for measure in GROUPS["maps"].measures} - {"num_events"}),
        ("hours", {"events_by_type", "sum_double"}),
        ("fresh_hours_of_days", {"session"}),
    ],
)
def test_arrays_take_exact_sums_extremes_and_events_in_order(name, by_sql):
    group = GROUPS[name]
    with duckdb.connect() as connection:
        build(connection, group, as_table(event_log(Random(1))))
        span = Span(START_US, START_US + DAY_US, START_US + DAY_US)
        suitable = {measure.name for measure in Source(connection, group, RELATIONS, span).suitable()}
    assert {measure.name for measure in group.measures} - suitable == by_sql


def test_only_reads_of_keys_that_a_retraction_touches_go_by_the_sql():
    group = GROUPS["everything"]
    events = event_log(Random(1), num_retractions=0)
    target = next(event for event in events if event["note_id"] == "12")
    back = {**target, "event_id": "r", "event_type": "retraction", "retracts": target["event_id"], "log_offset": 10_000}
    with duckdb.connect() as connection:
        build(connection, group, as_table([*events, back]))
        span = Span(START_US, START_US + DAY_US, START_US + DAY_US)
        assert Source(connection, group, RELATIONS, span).touched_keys().to_pylist() == [{"note_id": "12"}]


@pytest.mark.parametrize("column", ["rebuilt", "is_erased", "retracted_at"])
def test_arrays_leave_blocks_with_a_column_they_do_not_know_to_the_sql(column):
    group = GROUPS["everything"]
    with duckdb.connect() as connection:
        build(connection, group, as_table(event_log(Random(1))))
        connection.execute(f"alter table blocks add column {column} boolean")
        span = Span(START_US, START_US + DAY_US, START_US + DAY_US)
        assert Source(connection, group, RELATIONS, span).suitable() == ()


@pytest.mark.parametrize("name", list(GROUPS))
@settings(max_examples=3)  # a model's rows, below, go through the same arrays on five logs more
@given(seed=st.integers(0, 2**32))
def test_arrays_equal_the_equation(name, seed):
    random, group = Random(seed), GROUPS[name]
    events = event_log(random, num_retractions=random.choice((0, 1, 2, 20)))
    questions = as_spines_ask(random, some_reads(random, group, events))
    with duckdb.connect() as connection:
        build(connection, group, as_table(events))
        assert_answers(group, events, questions, answers(connection, group, questions, arrays=True, chunk=20))


@pytest.mark.parametrize("name", ["everything", "everything_of_a_user_and_author", "moments_and_events", "hours"])
@settings(max_examples=2)
@given(seed=st.integers(0, 2**32))
def test_sql_equals_the_equation_at_a_spines_t_and_k(name, seed):
    random, group = Random(seed), GROUPS[name]
    events = event_log(random)
    questions = as_spines_ask(random, some_reads(random, group, events, number=20))
    with duckdb.connect() as connection:
        build(connection, group, as_table(events))
        assert_answers(group, events, questions, answers(connection, group, questions, arrays=False, chunk=20))


@pytest.mark.parametrize("name", list(GROUPS))
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32))
def test_a_models_rows_equal_the_equation_at_any_t_k_and_log_position(tmp_path_factory, name, seed):
    random, group = Random(seed), GROUPS[name]
    events = event_log(random)
    questions = some_reads(random, group, events)
    with duckdb.connect() as connection:
        build(connection, group, as_table(events))
        connection.register("given", spine_table(group, questions))
        connection.execute("create table model as select *, -row_id as label from given")
        chunks = list(
            model_chunks(connection, "from model", group, RELATIONS, "label", tmp_path_factory.mktemp("scratch"), rows=25)
        )
    assert [chunk.num_rows for chunk in chunks] == [25, 15]
    found = pa.concat_tables(chunks)
    assert found.column_names[:2] == ["row_id", "label"]
    assert found["row_id"].to_pylist() == list(reversed(range(len(questions))))
    assert_answers(group, events, questions[::-1], found.to_pylist())


def test_a_model_without_rows_has_its_columns_and_types(tmp_path):
    group = GROUPS["everything"]
    events = event_log(Random(1))
    with duckdb.connect() as connection:
        build(connection, group, as_table(events))
        connection.register("given", spine_table(group, some_reads(Random(1), group, events)))
        connection.execute("create table model as from given")
        rows = pa.concat_tables(model_chunks(connection, "from model", group, RELATIONS, "row_id", tmp_path))
        [empty] = model_chunks(connection, "from model where false", group, RELATIONS, "row_id", tmp_path)
    assert empty.num_rows == 0
    assert empty.schema == rows.schema


@settings(max_examples=5)
@given(seed=st.integers(0, 2**32))
def test_laying_out_few_pairs_at_a_time_changes_nothing(seed):
    random, group = Random(seed), GROUPS["everything"]
    events = event_log(random, num_retractions=1)
    questions = as_spines_ask(random, some_reads(random, group, events))
    with duckdb.connect() as connection, pytest.MonkeyPatch.context() as patch:
        build(connection, group, as_table(events))
        at_once = answers(connection, group, questions, arrays=True, chunk=100)
        patch.setattr(compute_arrays, "PAIRS_AT_ONCE", 3)
        assert_alike(answers(connection, group, questions, arrays=True), at_once)


@settings(max_examples=5)
@given(seed=st.integers(0, 2**32))
def test_many_late_events_of_one_key_over_weeks_equal_the_sql(seed):
    """Hundreds of blocks per key, a third of the events minutes to days late: range minima span chunks, edges cut arrivals in
    flight. Too many for the oracle; the SQL is held to it above."""
    random, group = Random(seed), GROUPS["everything"]
    events = event_log(random, num_events=60, num_retractions=0)
    for number, row in enumerate(many := event_log(random, num_events=1500, num_retractions=0)):
        event_us = START_US + random.randrange(20 * DAY_US // FIVE_MINUTES_US) * FIVE_MINUTES_US + random.randrange(3)
        delay_us = random.choice((0, 0, 1, random.randrange(HOUR_US), random.randrange(DAY_US), random.randrange(6 * DAY_US)))
        row |= {"event_id": f"m{number}", "event_ts": event_us, "landed_at": event_us + delay_us, "note_id": "1"}
        events.append({**row, "log_offset": 10_000 + number})
    questions = as_spines_ask(random, some_reads(random, group, many, number=60))
    with duckdb.connect() as connection:
        build(connection, group, as_table(events))
        by_sql = answers(connection, group, questions, arrays=False, chunk=100)
        assert_alike(answers(connection, group, questions, arrays=True), by_sql)


def test_features_that_do_not_fit_in_memory_together_go_through_files_and_are_the_same(tmp_path):
    random, group = Random(5), GROUPS["everything"]
    events = event_log(random)
    questions = as_spines_ask(random, some_reads(random, group, events))
    with duckdb.connect() as connection, pytest.MonkeyPatch.context() as patch:
        build(connection, group, as_table(events))
        num_rows = connection.execute("select count(*) from blocks").fetchall()[0][0]
        at_once = answers(connection, group, questions, arrays=True)
        spine = Spine(spine_of(group, questions), "the spine")
        what = plan({group.name: group}, spine.schema.names, None)
        patch.setattr(compute_spill, "STATE_BYTES", 3 * compute_spill._BYTES_PER_VALUE * num_rows)
        batches = compute_spill.batches(what, {group.name: num_rows})
        assert len(batches) > 3
        assert tuple(name for batch in batches for name in batch.features) == what.features
        found = compute_spill.answers(
            connection,
            {group.name: RELATIONS},
            what,
            spine.span(what.keys, "corrected_at"),
            lambda: (spine.reads(part, what.keys, "corrected_at") for part in spine.chunks(rows=7)),
            tmp_path,
        )
        assert_alike([row for columns in found for row in pa.table(columns).to_pylist()], at_once)
    assert list(tmp_path.iterdir()) == []
