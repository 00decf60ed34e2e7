"""The training set that dbt builds, in steps and in one go, against the oracle, on a log with every mess."""

from datetime import datetime
from random import Random

import pytest

from tests.parity.generated_events import event_log, heartbeats
from tests.parity.test_batch_equals_oracle import assert_equal
from tests.warehouse.dbt_command import dbt
from warehouse.features.declarations import load_groups
from warehouse.features.generated import as_table
from warehouse.features.oracle import Read, first_arrivals, standing, values
from warehouse.features.recompute import recompute
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import land_records
from warehouse.time_algebra import DAY_US, FURTHEST_AHEAD_US, HOUR_US, arrival_tick, known_at, newest_tick

OUTCOMES = ("click", "long_view", "like", "comment", "share", "follow", "hide")


def in_us(instant: datetime) -> int:
    return round(instant.timestamp() * 1_000_000)


def known_when_labels_are_final(rows: list[dict], view: dict) -> list[dict]:
    """The events that stand, of everything that has arrived by the tick at which the view's outcomes are final."""
    final_us = max(known_at(view["event_ts"], view["landed_at"]), arrival_tick(view["event_ts"] + HOUR_US + FURTHEST_AHEAD_US))
    return standing(first_arrivals([row for row in rows if arrival_tick(row["landed_at"]) <= final_us]))


def land(lake: Lake, rows: list[dict]) -> None:
    ends = tuple(1 + max((row["log_offset"] for row in rows if row["log_partition"] == p), default=-1) for p in (0, 1))
    land_records(lake, as_table(rows), ends)


def content(lake: Lake) -> dict[str, list]:
    """Every table that dbt built, as sorted rows of text."""
    with lake.duckdb() as connection:
        return {
            name: sorted(map(str, connection.execute(f"select * from {name}").fetchall()))
            for name in lake.tables()
            if not name.startswith("lake.")
        }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A messy log, landed and built in three steps; the lake and the log's rows."""
    home = Home(tmp_path_factory.mktemp("steps"))
    lake = Lake.open(home)
    rows = event_log(Random(20260101), num_events=250)
    rows += heartbeats(rows, max(row["landed_at"] for row in rows) + 2 * DAY_US)
    for start, end in ((0, 90), (90, 200), (200, len(rows))):
        land(lake, rows[start:end])
        dbt(home, "run", "--quiet")
    return lake, rows


def test_every_training_example_equals_the_equation(built):
    lake, rows = built
    with lake.duckdb() as connection:
        examples = connection.execute("select * from training.training_examples").to_arrow_table().to_pylist()
    views = [row for row in first_arrivals(rows) if row["event_type"] == "view"]
    expected = {row["impression_id"]: row for row in views if row in known_when_labels_are_final(rows, row)}
    assert len(expected) < len(views)  # some were taken back in time
    assert {example["impression_id"] for example in examples} == set(expected)
    for example in examples:
        view = expected[example["impression_id"]]
        request_us = in_us(example["request_ts"])
        tick_us = newest_tick(request_us)
        assert request_us == view["event_ts"]
        assert in_us(example["feature_watermark"]) == tick_us
        for group in load_groups().values():
            read = Read(tuple(view[key] for key in group.keys), request_us, tick_us, tick_us)
            for feature, value in values(group, rows, read).items():
                assert_equal(example[feature], value, (feature, read))


@pytest.mark.parametrize("name", list(load_groups()))
def test_the_features_of_impressions_equal_the_sql_in_columns_types_and_values(built, name):
    lake, _ = built
    with lake.duckdb() as connection:
        spine = connection.execute(
            "select impression_id as row_id, * exclude (impression_id), null::bigint[] as known_position "
            "from training.impressions"
        ).to_arrow_table()
        built_rows = connection.execute(
            f"select * exclude (labels_known_at) from training.impression_{name} order by impression_id"
        ).to_arrow_table()
    by_sql = recompute(lake, load_groups()[name], spine)
    assert by_sql.num_rows > 50
    assert built_rows.rename_columns({"impression_id": "row_id"}).equals(by_sql.cast(built_rows.schema.set(0, by_sql.field(0))))


def test_the_compiled_model_shows_the_spine_and_says_what_is_added_to_it(built):
    lake, _ = built
    folder = lake.folder.parent / "dbt" / "target" / "compiled" / "headrace" / "warehouse" / "models" / "training"
    compiled = (folder / "impression_user_author_affinity.sql").read_text()
    assert "Each row is given the features of user_author_affinity" in compiled
    assert (
        "    user_id,\n    author_id,\n    request_ts,\n    feature_watermark,\n    feature_watermark as known_at,\n"
        in compiled
    )
    assert '-- depends_on: "scratch"."features"."user_author_affinity_1h"\n' in compiled


def test_every_label_is_an_outcome_that_landed_in_time(built):
    lake, rows = built
    with lake.duckdb() as connection:
        examples = connection.execute("select * from training.training_examples").to_arrow_table().to_pylist()
    views = {row["impression_id"]: row for row in first_arrivals(rows) if row["event_type"] == "view"}
    assert sum(example["label_click"] for example in examples) > 0
    num_taken_back = 0
    for example in examples:
        until_us = in_us(example["request_ts"]) + HOUR_US

        def outcomes(events, impression_id=example["impression_id"], until_us=until_us):
            mine = [row for row in events if row["impression_id"] == impression_id and row["landed_at"] < until_us]
            return {row["event_type"] for row in mine} & set(OUTCOMES)

        stands = outcomes(known_when_labels_are_final(rows, views[example["impression_id"]]))
        assert {name for name in OUTCOMES if example[f"label_{name}"]} == stands
        num_taken_back += stands != outcomes(first_arrivals(rows))
    assert num_taken_back > 0


def test_building_in_steps_repairing_and_building_at_once_give_the_same_tables(built, tmp_path):
    lake, rows = built
    in_steps = content(lake)
    home = Home(tmp_path)
    at_once = Lake.open(home)
    land(at_once, rows)
    dbt(home, "run", "--quiet")
    assert content(at_once) == in_steps
    dbt(home, "run", "--quiet", "--event-time-start", "2026-01-01", "--event-time-end", "2026-01-03")
    assert content(at_once) == in_steps
