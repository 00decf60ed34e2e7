"""`headrace features plan` beside the build it foretells: the same tables, the same ranges, and nothing written.

A dbt command costs some five seconds, so the tests share a home and run in the order of the file.
"""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.warehouse.dbt_command import dbt, try_dbt
from tests.warehouse.test_dbt_project import MODELS, change, copied, land, states  # noqa: F401
from warehouse.builds import DEFINITION, MEANINGS
from warehouse.datasets.simulator import simulate
from warehouse.features.declarations import load_groups
from warehouse.home import REPOSITORY, Home
from warehouse.lake import BUILT_UNTIL, Lake
from warehouse.landing import land_dataset
from warehouse.project import Project, table_of

pytestmark = pytest.mark.xdist_group("plan")


def planned(home: Home, *words: str, project: Path = REPOSITORY) -> list[dict[str, Any]]:
    """What `headrace features plan --json WORDS` prints."""
    code = "import sys; from warehouse.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "HEADRACE_HOME": str(home.path), "PYTHONPATH": str(project)}
    finished = forked.python(code, "features", "plan", "--json", *words, cwd=project, environment=environment)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def todo(steps: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {step["table"]: step for step in steps if step["state"] != "up to date"}


def ends_agree(home: Home, steps: dict[str, dict[str, Any]]) -> bool:
    lake = Lake.open(home)
    built = {name: datetime.fromisoformat(lake.table(name).properties[BUILT_UNTIL]) for name in steps}
    return built == {name: datetime.fromisoformat(step["end"]) for name, step in steps.items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    return Home(tmp_path_factory.mktemp("plan") / "home")


@pytest.fixture(scope="module")
def first_plan(home) -> list[dict[str, Any]]:
    """What the plan said of a history that had landed and was never built; it is built now."""
    land(home)
    before = states(home)
    steps = planned(home)
    assert states(home) == before
    dbt(home, "run")
    return steps


def test_a_first_plan_names_every_table_and_has_nothing_to_estimate_from(home, first_plan):
    steps = todo(first_plan)
    assert set(steps) == MODELS
    assert {step["state"] for step in steps.values()} == {"not built"}
    assert {step["seconds"] for step in steps.values()} == {None}
    until = steps["staging.stg_engagements"]["end"]
    assert {step["events"] for step in steps.values()} == {
        Lake.open(home).scan("lake.events", f"landed_at < '{until}'").num_rows
    }
    assert ends_agree(home, steps)
    group = load_groups()["note_engagement"]
    assert set(steps["training.impression_note_engagement"]["columns_added"]) == set(group.feature_names)


def test_a_built_lake_has_nothing_to_do_and_definitions_are_the_ones_dbt_wrote(home, first_plan):
    assert todo(planned(home)) == {}
    project, lake = Project.parse(home), Lake.open(home)
    written = {table_of(node): lake.table(table_of(node)).properties[DEFINITION] for _, node in project.models()}
    assert written == {table_of(node): project.definition_of(unique_id) for unique_id, node in project.models()}
    kept = json.loads(lake.table("training.training_examples").properties[MEANINGS])
    features = {name for group in load_groups().values() for name in (*group.feature_names, *group.sequence_names)}
    assert set(kept) == features


def test_a_plan_of_new_arrivals_is_what_the_build_then_does(home, first_plan):
    last = max(Lake.open(home).scan("lake.events")["landed_at"].to_pylist())
    land_dataset(Lake.open(home), simulate(seed=12, num_users=60, num_notes=80, days=1, start=last))
    steps, before = todo(planned(home)), states(home)
    assert {step["state"] for step in steps.values()} == {"new range"}
    dbt(home, "run")
    after = states(home)
    assert {name for name in MODELS if after[name] != before[name]} == set(steps)
    assert ends_agree(home, steps)
    blocks = steps["features.note_engagement"]
    grown = Lake.open(home).scan("features.note_engagement", f"known_at >= '{blocks['start']}'").num_rows
    assert 0.4 < blocks["rows"] / grown < 2.5
    assert blocks["seconds"] > 0
    assert blocks["bytes"] > 0
    assert todo(planned(home)) == {}


def test_a_changed_meaning_under_the_same_name_is_planned_plainly_refused_and_accepted_by_a_full_refresh(
    home,
    first_plan,
    copied,  # noqa: F811
):
    change(
        copied, "{name: num_hides, aggregation: count, where: \"event_type = 'hide'\"", "{name: num_hides, aggregation: count"
    )
    before = states(home)
    steps = todo(planned(home, project=copied))
    assert steps["features.note_engagement"]["columns_changed"] == ["num_hides"]
    assert steps["training.training_examples"]["columns_changed"] == ["note_num_hides_7d"]
    assert steps["features.note_engagement"]["refused"]
    assert not any(name.startswith("features.author") for name in steps)

    refused = try_dbt(home, "run", project=copied)
    assert refused.returncode != 0
    assert "features.note_engagement: num_hides changed meaning under the same name" in refused.stdout
    assert "--full-refresh --select note_engagement+" in refused.stdout
    assert "Traceback" not in refused.stdout
    assert states(home) == before

    dbt(home, "run", "--full-refresh", "--select", "note_engagement+", project=copied)
    after = states(home)
    assert {name for name in MODELS if after[name] != before[name]} == set(steps)
    assert todo(planned(home, project=copied)) == {}
