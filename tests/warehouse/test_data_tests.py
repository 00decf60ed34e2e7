"""The generic data tests hold on a sound lake and fail on one that breaks their bound; a bound that is none is refused."""

import json

import pytest

from tests.warehouse.dbt_command import dbt, try_dbt
from tests.warehouse.test_dbt_project import copied  # noqa: F401
from warehouse.datasets.simulator import simulate
from warehouse.features.declarations import load_groups
from warehouse.features.lineage import EXACT, ROUNDED, lineage
from warehouse.home import REPOSITORY, Home
from warehouse.lake import BUILT_UNTIL, Lake
from warehouse.landing import land_dataset

STAGING = "warehouse/models/staging/_staging.yml"
BOUNDS = """      - is_fresh: {name: fresh_held, arguments: {within: 1 day}}
      - is_fresh: {name: fresh_broken, arguments: {within: 1 second}}
      - volume_within: {name: volume_held, arguments: {at_least: 1, at_most: 100000}}
      - volume_within: {name: volume_broken, arguments: {at_least: 100000}}
      - null_rate_at_most: {name: nulls_held, arguments: {column_name: watch_ms, rate: 1}}
      - null_rate_at_most: {name: nulls_broken, arguments: {column_name: watch_ms, rate: 0}}
"""


def bound(project) -> None:
    path = project / STAGING
    marker = "      - nothing_beyond_its_tick\n"
    text = path.read_text()
    assert text.count(marker) == 1
    path.write_text(text.replace(marker, marker.replace("tick", "tick: {name: tick_held}") + BOUNDS))


def test_bounds_hold_and_break_and_nothing_lies_beyond_its_tick(tmp_path, copied):  # noqa: F811
    home = Home(tmp_path / "home")
    land_dataset(Lake.open(home), simulate(seed=11, num_users=60, num_notes=80, days=4))  # two whole days among them
    bound(copied)
    dbt(home, "run", "--select", "stg_engagements", project=copied)

    def outcome(selected: str) -> dict[str, str]:
        try_dbt(home, "test", "--select", selected, project=copied)
        results = json.loads((home.dbt / "target" / "run_results.json").read_text())["results"]
        return {one["unique_id"].split(".")[2]: one["status"] for one in results}

    results = outcome("stg_engagements,test_type:generic")
    named = {name: results[name] for name in results if name.endswith(("_held", "_broken"))}
    assert named == {
        "tick_held": "pass",
        "fresh_held": "pass",
        "fresh_broken": "fail",
        "volume_held": "pass",
        "volume_broken": "fail",
        "nulls_held": "pass",
        "nulls_broken": "fail",
    }

    lake = Lake.open(home)
    with lake.transaction("staging.stg_engagements") as transaction:
        transaction.set_properties({BUILT_UNTIL: "2022-04-25T12:00:00+00:00"})
    assert outcome("tick_held") == {"tick_held": "fail"}

    features = {row["feature"]: row for row in json.loads((home.dbt / "target" / "features.json").read_text())}
    assert features["note_ctr_1h"]["source_columns"] == [
        f"staging.stg_engagements.{column}" for column in ("event_ts", "event_type", "note_id")
    ]


@pytest.mark.parametrize(
    ("feature", "columns", "steps", "bound"),
    [
        (
            "note_total_watch_ms_1d",
            {"event_ts", "note_id", "watch_ms"},
            [
                "total_watch_ms: sum of watch_ms, per (note_id) and 5-minute block of staging.stg_engagements",
                "features.note_engagement, features.note_engagement_1h, features.note_engagement_1d: ",
                "note_total_watch_ms_1d: combined over 1d before the tick T, as known at K",
            ],
            "exact",
        ),
        (
            "note_ctr_1d",
            {"event_ts", "event_type", "note_id"},
            [
                "num_clicks: count where event_type = 'click'",
                "features.note_engagement, ",
                "note_num_clicks_1d: combined over 1d",
                "num_views: count where event_type = 'view'",
                "features.note_engagement, ",
                "note_num_views_1d: combined over 1d",
                "note_ctr_1d = num_clicks_1d / num_views_1d",
            ],
            "within rounding: 1e-9 relative",
        ),
    ],
)  # fmt: skip
def test_lineage_leads_from_source_columns_to_the_feature(feature, columns, steps, bound):
    found = lineage(load_groups()["note_engagement"], feature)
    assert found["source_columns"] == sorted(f"staging.stg_engagements.{column}" for column in columns)
    assert len(found["steps"]) == len(steps)
    assert all(part in step for part, step in zip(steps, found["steps"], strict=True))
    assert found["error_bound"].startswith(bound)
    assert found["table"] == f"training.impression_note_engagement.{feature}"


@pytest.mark.parametrize(
    ("short", "bound"),
    [
        ("median_ms_1h", "approximate: within 1 % of the quantile; the same in every execution"),
        ("p90_1d", "approximate: within 5 % of the quantile; the same in every execution"),
        ("num_users_7d", "approximate: one standard error is 1.6 %; the same in every execution"),
        ("num_events_1d", EXACT),
        ("top_users_7d", EXACT),
        ("thirds_by_type_1d", ROUNDED),
        ("avg_by_long_7d", ROUNDED),
    ],
)
def test_the_bound_of_a_feature_says_what_it_approximates(short, bound):
    group = load_groups(REPOSITORY / "tests" / "parity" / "every_aggregation")["maps"]
    assert lineage(group, f"{group.entity}_{short}")["error_bound"] == bound


def test_a_derived_feature_says_how_far_its_inputs_are_off():
    group = load_groups(REPOSITORY / "tests" / "parity" / "every_aggregation")["maps"]
    bound = lineage(group, f"{group.entity}_middle")["error_bound"]
    assert bound.startswith(f"{ROUNDED}; its inputs are approximate: one standard error is 1.6 %")
    assert "within 1 % of the quantile" in bound
