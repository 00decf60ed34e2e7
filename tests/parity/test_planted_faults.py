"""Faults planted in each execution, one at a time: a parity that cannot fail proves nothing, so every one must be found.

Compute and the training join read their blocks by the batch SQL, so faults of blocks and roll-ups are planted there once. The
training join is planted in the text of its models and in the reads that its engine is asked, run without dbt (`training_join`):
faults of dbt's ranges and commits are not planted. The live store has no roll-ups (its layers hold 5-minute blocks only) and no
training join.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from random import Random

import duckdb
import pytest

from streaming_sql import block_layer, entry_maps, event_lists, moments
from streaming_sql.arrivals import Arrivals
from streaming_sql.block_layer import BlockLayer
from streaming_sql.feed import Feed
from streaming_sql.head import Head, HeadEvent
from tests.parity import training_join
from tests.parity.generated_events import event_log, some_reads
from tests.parity.test_batch_equals_oracle import GROUPS, assert_equal, build, read_batch
from tests.parity.test_compute_equals_oracle import answers, as_spines_ask
from tests.parity.test_dbt_equals_oracle import OUTCOMES, known_when_labels_are_final
from tests.parity.test_live_equals_oracle import assert_live
from warehouse.features import compute_arrays, compute_model, render
from warehouse.features.generated import as_table
from warehouse.features.oracle import Read, first_arrivals, values
from warehouse.time_algebra import FIVE_MINUTES_US, HOUR_US, newest_tick

SEEDS = 12
"""A fault must be found on one of so many logs."""


def replaced(patch, function, old, new):
    """Plants by text: what a function of `render` gives has `new` for every `old`; returns whether it could, for each text."""
    honest, planted = getattr(render, function), []

    def plant(*words, **named):
        sql = honest(*words, **named)
        planted.append(old in sql)
        return sql.replace(old, new)

    patch.setattr(render, function, plant)
    return planted


def assert_found(plant, check):
    """The check fails on some seed with the fault planted, and passes on the very same without it."""
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        seed = next((seed for seed in range(SEEDS) if fails(check, seed)), None)
    assert seed is not None, f"{getattr(plant, '__name__', plant)} was not found"
    check(Random(seed))


def fails(check, seed):
    try:
        check(Random(seed))
    except AssertionError:
        return True
    return False


def batch(group):
    def check(random):
        events = event_log(random)
        questions = some_reads(random, group, events)
        with duckdb.connect() as connection:
            build(connection, group, as_table(events))
            found = read_batch(connection, group, questions)
        for read, answer in zip(questions, found, strict=True):
            for feature, value in values(group, events, read).items():
                assert_equal(answer[feature], value, (feature, read))

    return check


def computed(group):
    def check(random):
        events = event_log(random, num_retractions=2)
        questions = as_spines_ask(random, some_reads(random, group, events))
        with duckdb.connect() as connection:
            build(connection, group, as_table(events))
            found = answers(connection, group, questions, arrays=True)
        for read, answer in zip(questions, found, strict=True):
            for feature, value in values(group, events, read).items():
                assert_equal(answer[feature], value, (feature, read))

    return check


def live(*names):
    def check(random):
        groups = {name: GROUPS[name] for name in names}
        assert_live(groups, event_log(random, num_retractions=10), random)

    return check


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        ("point_in_time_sql", "> at_upper.block_start", ">= at_upper.block_start"),
        ("block_sql", "came.known_at as row_known_at", "came.block_start + to_microseconds(300000000) as row_known_at"),
        ("staging_sql", "previous_landed_at is null", "true"),
        ("roll_up_sql", "greatest(known_at", "least(known_at"),
        ("roll_up_sql", "sum(sum_double)", "max(sum_double)"),
        ("point_in_time_sql", "coalesce(rows_of.replaced_at > ranges.blocks_known_at, true)", "true"),
    ],
    ids=["edge", "known_at dropped", "duplicates kept", "hours known too early", "largest child", "rebuilt rows ignored"],
)
def test_a_fault_in_the_batch_sql_is_found(function, old, new):
    planted = []
    assert_found(lambda patch: planted.append(replaced(patch, function, old, new)), batch(GROUPS["everything"]))
    assert any(planted[0]), f"{function} no longer says {old!r}"


def lower_edge_open(patch):
    for module in (block_layer, event_lists, entry_maps):
        honest = module.stretches

        def later(place, row, lower_us, upper_us, of=honest):
            return of(place, row, lower_us + FIVE_MINUTES_US, upper_us)

        patch.setattr(module, "stretches", later)


def event_at_t_included(patch):
    honest = Head.visible
    patch.setattr(Head, "visible", lambda self, key, position, before_us: honest(self, key, position, before_us + 1))


def known_at_dropped(patch):
    honest = Feed._due
    patch.setattr(Feed, "_due", lambda self, tick_us: honest(self, 2**61))


def duplicates_kept(patch):
    patch.setattr(Arrivals, "_admit", lambda self, event_id, arrival, superseded: True)


def rebuilt_rows_added(patch):
    patch.setattr(BlockLayer, "without", lambda self, plan, row, block_start: self)


def retractions_late_in_the_head(patch):
    patch.setattr(HeadEvent, "is_visible", lambda self, position: self.log_offset < position[self.log_partition])


def the_larger_half_taken_for_both(patch):
    patch.setattr(moments, "merged", lambda one, other: one if one[:, 0].sum() > other[:, 0].sum() else other)


def entries_not_added_up(patch):
    honest = entry_maps.Found.grouped.__func__
    patch.setattr(entry_maps.Found, "grouped", classmethod(lambda cls, shape, parts: honest(cls, shape, parts[:1])))


@pytest.mark.parametrize(
    ("plant", "names"),
    [
        (lower_edge_open, ("everything", "maps", "moments_and_events")),
        (event_at_t_included, ("fresh_sessions", "fresh_maps")),
        (known_at_dropped, ("everything", "fresh_moments_and_events")),
        (duplicates_kept, ("everything",)),
        (rebuilt_rows_added, ("everything", "moments_and_events")),
        (retractions_late_in_the_head, ("fresh_sessions", "everything")),
        (the_larger_half_taken_for_both, ("moments_and_events", "fresh_moments_and_events")),
        (entries_not_added_up, ("maps", "fresh_maps")),
    ],
)
def test_a_fault_in_the_live_store_is_found(plant, names):
    assert_found(plant, live(*names))


def arrays_edge_closed(patch):
    honest = compute_arrays.Places.before
    patch.setattr(compute_arrays.Places, "before", lambda self, codes, times: honest(self, codes, times + 1))


def arrays_know_everything(patch):
    for owner in {one for one in vars(compute_arrays).values() if isinstance(one, type) and "_until" in vars(one)}:
        honest = owner._until
        patch.setattr(owner, "_until", lambda self, codes, known, edge, of=honest: of(self, codes, known + 100_000, edge))


@pytest.mark.parametrize("plant", [arrays_edge_closed, arrays_know_everything])
def test_a_fault_in_the_arrays_of_compute_is_found(plant):
    assert_found(plant, computed(GROUPS["everything"]))


def trained(random):
    """Labels, and features of a block-fresh and of an event-fresh group, of every impression that stands."""
    events = with_outcomes_at_the_edge(random, event_log(random, num_events=160))
    known = {row["impression_id"]: (row, known_when_labels_are_final(events, row)) for row in views(events)}
    expected = {name: (view, stands) for name, (view, stands) in known.items() if view in stands}
    with duckdb.connect() as connection, tempfile.TemporaryDirectory() as scratch:
        for group in (GROUPS["note_engagement"], GROUPS["user_activity"]):
            build(connection, group, as_table(events))
            found = training_join.labels(connection)
            assert {row["impression_id"] for row in found} == set(expected)
            for row in found:
                assert_labels(row, *expected[row["impression_id"]])
            for answer in training_join.features(connection, group, Path(scratch)):
                view, _ = expected[answer["impression_id"]]
                tick_us = newest_tick(view["event_ts"])
                read = Read(tuple(view[key] for key in group.keys), view["event_ts"], tick_us, tick_us)
                for feature, value in values(group, events, read).items():
                    assert_equal(answer[feature], value, (feature, read))


def with_outcomes_at_the_edge(random, events):
    """And outcomes that land when the attribution window of a view ends, or a microsecond beside it."""
    edges = [
        {**view, "event_id": f"edge{number}", "event_type": "follow", "landed_at": view["event_ts"] + HOUR_US + beside}
        for number, (view, beside) in enumerate(zip(random.sample(views(events), 6), (-1, 0, 1) * 2, strict=True))
    ]
    rows = sorted(events + edges, key=lambda row: row["landed_at"])
    for partition in (0, 1):
        for offset, row in enumerate(row for row in rows if row["log_partition"] == partition):
            row["log_offset"] = offset
    return rows


def views(events):
    return [row for row in first_arrivals(events) if row["event_type"] == "view"]


def assert_labels(row, view, stands):
    until_us = view["event_ts"] + HOUR_US
    mine = [one for one in stands if one["impression_id"] == view["impression_id"] and one["landed_at"] < until_us]
    came = {one["event_type"] for one in mine}
    assert {name: row[f"label_{name}"] for name in OUTCOMES} == {name: int(name in came) for name in OUTCOMES}, view


@pytest.mark.parametrize(
    ("model", "old", "new"),
    [
        ("impression_note_engagement", "feature_watermark as known_at", "timestamptz '2100-01-01 00:00:00+00' as known_at"),
        ("impressions", "retracted.retracted_at > views.labels_known_at", "false"),
        ("impressions", "(retracted.retracted_at is null or retracted.retracted_at > views.labels_known_at)", "true"),
        ("impression_labels", "outcomes.landed_at < ", "outcomes.landed_at <= "),
        ("impression_labels", "outcomes.landed_at < spine.request_ts + interval '3600' second", "true"),
        ("impression_labels", "(outcomes.retracted_at is null or outcomes.retracted_at > spine.labels_known_at)", "true"),
    ],
    ids=["K is infinity", "retracted later", "retracted views", "label at its edge", "label after its end", "retracted labels"],
)
def test_a_fault_in_the_training_models_is_found(model, old, new):
    honest = training_join.model_sql
    assert old in honest(model)

    def plant(patch):
        patch.setattr(
            training_join, "model_sql", lambda name: honest(name).replace(old, new) if name == model else honest(name)
        )

    assert_found(plant, trained)


def asked(**change):
    """Every read that the training models ask of the engine is changed."""

    def plant(patch):
        honest = compute_model._reads

        def changed(chunk, group):
            reads = honest(chunk, group)
            return replace(reads, **{name: getattr(reads, name) + by for name, by in change.items()})

        patch.setattr(compute_model, "_reads", changed)

    return plant


def training_duplicates_kept(patch):
    assert replaced(patch, "staging_sql", "previous_landed_at is null", "true") == []


@pytest.mark.parametrize(
    "plant",
    [asked(tick_us=FIVE_MINUTES_US), asked(tick_us=-FIVE_MINUTES_US), asked(request_us=1), training_duplicates_kept],
    ids=["a tick later", "a tick earlier", "the request itself seen", "duplicates kept"],
)
def test_a_fault_in_the_reads_of_the_training_join_is_found(plant):
    assert_found(plant, trained)
