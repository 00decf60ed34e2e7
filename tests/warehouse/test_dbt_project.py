"""The dbt project as a dbt user meets it: a bare `dbt build` from the repository root, its state under one home.

A dbt command costs some five seconds, so the tests share two homes and run in the order of the file.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.warehouse.dbt_command import dbt, try_dbt
from tests.warehouse.test_cli import small_disk  # noqa: F401
from warehouse.datasets.simulator import simulate
from warehouse.features.declarations import load_groups
from warehouse.home import REPOSITORY, Home
from warehouse.lake import Lake
from warehouse.landing import land_dataset

pytestmark = pytest.mark.xdist_group("dbt project")

DBT = str(Path(sys.executable).with_name("dbt"))
BLOCKS = "warehouse/models/blocks/_blocks.yml"
GROUPS = ("note_engagement", "author_engagement", "user_activity", "user_author_affinity")
MODELS = {
    "staging.stg_engagements",
    "staging.stg_shadowed_arrivals",
    "staging.stg_retractions",
    "staging.stg_retracted_events",
    *(f"features.{group}{granularity}" for group in GROUPS for granularity in ("", "_1h", "_1d")),
    "training.impressions",
    "training.impression_labels",
    *(f"training.impression_{group}" for group in GROUPS),
    "training.training_examples",
}


def land(home: Home) -> None:
    land_dataset(Lake.open(home), simulate(seed=11, num_users=60, num_notes=80, days=2))


def states(home: Home) -> dict[str, str]:
    """Each built table's metadata file: another one for every commit."""
    lake = Lake.open(home)
    return {name: lake.table(name).metadata_location for name in lake.tables() if not name.startswith("lake.")}


def content(home: Home) -> dict[str, list[str]]:
    """Each built table's rows as sorted text."""
    with Lake.open(home).duckdb() as connection:
        return {name: sorted(map(str, connection.execute(f"from {name}").fetchall())) for name in states(home)}


def start(home: Home, *words: str) -> subprocess.Popen[str]:
    """The installed dbt, running."""
    return subprocess.Popen(
        [DBT, "--no-use-colors", *words],
        cwd=REPOSITORY,
        env={**os.environ, "HEADRACE_HOME": str(home.path), "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    printed = process.communicate(timeout=280)[0]
    return process.returncode, printed


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    return Home(tmp_path_factory.mktemp("dbt") / "home")


@pytest.fixture(scope="module")
def built_empty(home) -> str:
    """What `dbt build` printed on a home that nothing was ever written to."""
    before = set(os.listdir(REPOSITORY))
    status, printed = finish(start(home, "build"))
    assert status == 0, printed
    strays = {
        name for name in set(os.listdir(REPOSITORY)) - before if name in ("logs", "target", "dbt_packages") or "{" in name
    }
    assert not strays  # everything lies under the home
    return printed


@pytest.fixture(scope="module")
def built(home, built_empty) -> str:
    """What `dbt build` printed once a small history had landed; the home holds its tables."""
    land(home)
    return dbt(home, "build")


@pytest.fixture
def copied(tmp_path) -> Path:
    """The project in a folder of its own, to change."""
    project = tmp_path / "project"
    for folder in ("warehouse", "streaming_sql/models", "streaming_sql/macros"):
        shutil.copytree(REPOSITORY / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("dbt_project.yml", "profiles.yml"):
        shutil.copy(REPOSITORY / file, project / file)
    return project


def change(project: Path, old: str, new: str) -> int:
    """Replaces the first occurrence in the declarations; returns its line."""
    path = project / BLOCKS
    before, found, after = path.read_text().partition(old)
    assert found
    path.write_text(before + new + after)
    return before.count("\n") + 1


def test_a_build_of_nothing_makes_every_table_empty(home, built_empty):
    assert "ERROR=0 SKIP=0" in built_empty
    lake = Lake.open(home)
    assert set(states(home)) == MODELS
    assert all(lake.scan(name).num_rows == 0 for name in MODELS)


def test_a_run_prints_no_warning_and_keeps_its_log_under_the_home(home, built_empty):
    assert "WARN=0" in built_empty
    assert "WARNING" not in built_empty
    assert "eprecat" not in built_empty
    assert "CREATE" in (home.dbt / "logs" / "dbt.log").read_text().upper()
    assert (home.dbt / "target" / "manifest.json").is_file()


def test_a_build_of_history_passes_every_test_and_fills_every_table(home, built):
    assert "Completed successfully" in built
    assert "WARN=0 ERROR=0 SKIP=0" in built
    lake = Lake.open(home)
    rows = {name: lake.scan(name).num_rows for name in MODELS}
    empty = {"staging.stg_shadowed_arrivals", "staging.stg_retractions", "staging.stg_retracted_events"}
    assert {name for name, count in rows.items() if count == 0} == empty
    views = lake.scan("lake.events", "event_type = 'view'", columns=("event_id",))["event_id"]
    assert rows["training.training_examples"] <= len(views.unique())
    assert rows["training.training_examples"] == rows["training.impressions"] > len(views.unique()) * 0.8


def test_a_second_build_commits_nothing(home, built):
    before = states(home)
    dbt(home, "build")
    assert states(home) == before


def test_compile_and_docs_work_as_any_dbt_user_expects(home, built):
    shown = dbt(home, "compile", "--select", "note_engagement_1h")
    assert "time_bucket" in shown or "block_start" in shown
    dbt(home, "docs", "generate")
    catalog = json.loads((home.dbt / "target" / "catalog.json").read_text())
    blocks = catalog["nodes"]["model.headrace.note_engagement"]
    assert blocks["metadata"]["schema"] == "features"
    assert {"note_id", "block_start", "known_at", "num_views"} <= set(blocks["columns"])
    assert "source.headrace.lake.events" in catalog["sources"]
    manifest = json.loads((home.dbt / "target" / "manifest.json").read_text())
    for group, declared in load_groups().items():
        built_columns = set(catalog["nodes"][f"model.headrace.impression_{group}"]["columns"])
        told = manifest["nodes"][f"model.headrace.impression_{group}"]["columns"]
        assert built_columns == set(told) == {"impression_id", "labels_known_at", *declared.all_names}
        assert all(column["description"] for column in told.values())
    clicks = manifest["nodes"]["model.headrace.impression_note_engagement"]["columns"]["note_num_clicks_1h"]
    assert clicks["description"] == "count where event_type = 'click' over 1h before the tick T, as known at K."
    assert "staging.stg_engagements.event_type" in clicks["config"]["meta"]["source_columns"]


def test_a_declaration_with_an_error_is_refused_with_file_and_line_and_nothing_else(home, built, copied):
    before = states(home)
    line = change(copied, "aggregation: count", "aggregation: cuont")
    refused = try_dbt(home, "build", project=copied)
    assert refused.returncode != 0
    assert f"{BLOCKS}:{line}: measure num_views: aggregation must be one of count, sum" in refused.stdout
    assert "got 'cuont'" in refused.stdout
    assert "Traceback" not in refused.stdout
    assert states(home) == before


def test_a_killed_build_and_a_second_one_beside_it_leave_what_an_undisturbed_build_makes(home, built, tmp_path):
    disturbed = Home(tmp_path / "disturbed")
    land(disturbed)
    first = start(disturbed, "build")

    def locked() -> bool:
        with open(disturbed.dbt / "build.lock", "a") as handle:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    wait_for(locked, first)
    os.kill(first.pid, signal.SIGSTOP)
    status, printed = finish(start(disturbed, "build"))
    os.kill(first.pid, signal.SIGCONT)
    assert status != 0
    assert f"another dbt command runs on {disturbed.path}; wait for it" in printed
    assert "Traceback" not in printed

    wait_for(lambda: "features.note_engagement" in states(disturbed), first)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert "training.training_examples" not in states(disturbed)  # it was in the middle

    assert "ERROR=0 SKIP=0" in dbt(disturbed, "run")
    assert content(disturbed) == content(home)


def test_a_build_on_a_full_disk_fails_in_words_and_completes_once_there_is_room(home, built, small_disk):  # noqa: F811
    disk, resize = small_disk
    resize("200m")
    full = Home(disk / "home")
    land(full)
    dbt(full, "run", "--select", "stg_engagements")
    before = states(full)
    used = int(subprocess.check_output(["df", "-k", "--output=used", disk], text=True).split()[-1])
    resize(f"{used + 300}k")
    status, printed = finish(start(full, "run"))
    assert status != 0
    assert "no space" in printed.lower()
    assert "Logging error" not in printed
    assert states(full)["staging.stg_engagements"] == before["staging.stg_engagements"]
    resize("200m")
    dbt(full, "run")
    assert content(full) == content(home)


def test_a_changed_declaration_rebuilds_its_group_and_what_hangs_on_it_and_nothing_else(home, built, copied):
    before, was = states(home), content(home)
    change(
        copied,
        "{name: num_follows, aggregation: count, where: \"event_type = 'follow'\", windows: [7d]}",
        "{name: num_likes, aggregation: count, where: \"event_type = 'like'\", windows: [7d]}",
    )
    dbt(home, "run", project=copied)
    after = states(home)
    assert {name for name in MODELS if after[name] != before[name]} == {
        "features.author_engagement",
        "features.author_engagement_1h",
        "features.author_engagement_1d",
        "training.impression_author_engagement",
        "training.training_examples",
    }
    now = content(home)
    assert all(len(now[name]) == len(was[name]) for name in MODELS)
    with Lake.open(home).duckdb() as connection:
        columns = {row[0] for row in connection.execute("describe features.author_engagement").fetchall()}
        assert "num_likes" in columns
        assert "num_follows" not in columns
        counted = connection.execute("select sum(num_likes) from features.author_engagement").fetchall()
        happened = connection.execute("select count(*) from staging.stg_engagements where event_type = 'like'").fetchall()
        assert counted == happened
        assert connection.execute("select max(author_num_likes_7d) > 0 from training.training_examples").fetchall() == [(True,)]
