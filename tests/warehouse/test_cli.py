"""`headrace land | sql | features | export-training`: what is printed, the exit status, and nothing half-done on bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.cli import main
from warehouse.datasets.simulator import simulate
from warehouse.features import document
from warehouse.features.declarations import load_groups
from warehouse.home import REPOSITORY, Home
from warehouse.lake import Lake
from warehouse.landing import EVENTS, create_tables, land_dataset


@pytest.fixture
def folder(home, monkeypatch) -> Home:
    """The home that the command line finds in its environment, and no data root."""
    monkeypatch.setenv("HEADRACE_HOME", str(home.path))
    monkeypatch.setenv("HEADRACE_DATA", str(home.path / "no data"))
    return home


@pytest.fixture
def events(tmp_path) -> Path:
    """Three events in a file; one is a dead letter."""
    lines = [
        {"event_id": "a", "event_type": "view", "user_id": "u1", "event_ts": "2026-01-01T00:00:00Z"},
        {"event_id": "b", "event_type": "click", "user_id": "u1", "event_ts": "2026-01-01T00:00:01Z"},
        {"event_id": "c", "event_type": "click", "user_id": "u1", "event_ts": "yesterday"},
    ]
    path = tmp_path / "events.ndjson"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Runs a command that must exit with 2; returns its one sentence."""
    assert main(list(words)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    progress, said, sentence = printed.err.partition(f"headrace {words[0]}: ")
    assert said
    assert "Traceback" not in progress
    return sentence.strip()


@pytest.mark.parametrize("command", ["land", "sql", "features", "export-training"])
def test_help_says_what_the_command_does_and_shows_examples(command, capsys, folder):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: headrace {command}")
    assert f"examples:\n  headrace {command}" in told
    assert not folder.path.exists()  # asking for help makes nothing


def test_landing_a_file_tells_what_landed_and_a_second_time_that_nothing_was_added(folder, events, capsys):
    assert main(["land", str(events), "--delay", "2"]) == 0
    told = capsys.readouterr().out
    assert "events.ndjson: 2 events landed, 1 dead letters\n" in told
    assert "why: headrace sql" in told
    assert main(["land", str(events), "--delay", "2"]) == 0
    assert capsys.readouterr().out == "events.ndjson had landed before; nothing was added\n"
    assert main(["sql", "--json", "select reason, count(*) as n from lake.dead_letters group by reason"]) == 0
    assert json.loads(capsys.readouterr().out) == {"reason": "event_ts is missing or not a time with a zone", "n": 1}


def test_json_output_is_json_and_nothing_else(folder, events, capsys):
    assert main(["land", "--json", str(events), "--delay", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert json.loads(printed.out) == {"source": "events.ndjson", "num_events": 2, "num_dead_letters": 1, "already": False}
    query = "select event_id, event_ts, user_id is null as nobody from lake.events where event_type <> 'heartbeat' order by 1"
    assert main(["sql", "--json", query]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"event_id": "a", "event_ts": "2026-01-01 00:00:00+00:00", "nobody": False},
        {"event_id": "b", "event_ts": "2026-01-01 00:00:01+00:00", "nobody": False},
    ]
    assert main(["features", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    names = [name for group in load_groups().values() for name in (*group.feature_names, *group.sequence_names)]
    assert sorted(row["feature"] for row in listed) == sorted(names)


def test_the_simulator_lands_by_name(folder, capsys):
    words = ["land", "--json", "simulator", "--seed", "3", "--users", "30", "--notes", "60", "--days", "1"]
    assert main(words) == 0
    landed = json.loads(capsys.readouterr().out)
    assert landed["num_events"] == simulate(3, num_users=30, num_notes=60, days=1).events.num_rows
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["already"] is True


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["kuairand"], "KuaiRand folder {home}/no data/kuairand does not exist; point HEADRACE_DATA at the folder"),
        (["simulator", "--days", "0"], "simulator: "),
        (["nowhere.ndjson"], "no file nowhere.ndjson"),
        (["nowhere"], "no source 'nowhere': give kuairand, simulator, or a file ending in .parquet, .csv or .ndjson"),
        (["{tmp}/columns.csv"], "columns.csv has no column event_id, event_ts; it has id, event_type"),
        (["{tmp}/broken.parquet"], "broken.parquet cannot be read as parquet"),
        (["{tmp}/empty.csv"], "empty.csv has no column event_id, event_type, event_ts"),
        (["{tmp}/good.csv", "--landed-at", "received"], "good.csv has no column received; it has event_id"),
        (["{tmp}/good.csv", "--delay", "-1"], "--delay must not be negative, got -1.0"),
        (["{tmp}/good.csv", "--delay", "1", "--landed-at", "event_ts"], "give --landed-at or --delay, not both"),
    ],
)
def test_a_source_that_cannot_land_is_refused_with_a_sentence(folder, tmp_path, capsys, words, sentence):
    (tmp_path / "columns.csv").write_text("id,event_type\n1,view\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "good.csv").write_text("event_id,event_type,event_ts\na,view,2026-01-01T00:00:00Z\n")
    told = refused(capsys, "land", *(word.format(tmp=tmp_path) for word in words))
    assert sentence.format(home=folder.path) in told
    assert not Lake.open(folder).exists(EVENTS)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda data: (data / "impressions.parquet").unlink(), "impressions.parquet does not exist"),
        (lambda data: (data / "impressions.parquet").write_bytes(b"PAR1 and no more"), "cannot be read as Parquet"),
        (lambda data: pq.write_table(pa.table({"user": [1]}), data / "impressions.parquet"), "; it has user"),
    ],
    ids=["missing file", "unreadable file", "wrong columns"],
)
def test_a_data_folder_that_is_not_whole_is_refused(folder, tmp_path, monkeypatch, capsys, spoil, sentence):
    data = tmp_path / "data" / "kuairand"
    data.mkdir(parents=True)
    for name in ("impressions.parquet", "videos.parquet", "users.parquet", "user_history.parquet"):
        (data / name).write_bytes(b"PAR1 and no more")
    spoil(data)
    monkeypatch.setenv("HEADRACE_DATA", str(tmp_path / "data"))
    assert sentence in refused(capsys, "land", "kuairand")
    assert not Lake.open(folder).exists(EVENTS)


def test_a_home_that_is_a_file_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "file"))
    for words in (["land", "simulator"], ["sql", "select 1"], ["export-training"]):
        assert "point HEADRACE_HOME at a folder that can be written" in refused(capsys, *words)


def test_sql_prints_a_table(folder, capsys):
    create_tables(Lake.open(folder))
    for query in (
        "show all tables",
        "describe lake.events",
        "from lake.events",
        "explain select 1",
        "EXPLAIN ANALYZE select count(*) from lake.events",
        "select 1; ",
    ):
        assert main(["sql", query]) == 0, query
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("select 1; select 2", "one read-only statement at a time"),
        ("", "one read-only statement at a time"),
        ("delete from lake.events", "one read-only statement at a time"),
        ("insert into lake.users values ('u')", "one read-only statement at a time"),
        ("drop view lake.events", "one read-only statement at a time"),
        ("create table t as select 1", "one read-only statement at a time"),
        ("copy (select 1) to '{lake}/x.csv'", "one read-only statement at a time"),
        ("export database '{lake}/x'", "one read-only statement at a time"),
        ("explain analyze copy (select 1) to '{lake}/x.csv'", "one read-only statement at a time"),
        ("explain (analyze, format json) copy (select 1) to '{lake}/x.csv'", "one read-only statement at a time"),
        ("/* */ explain /* */ analyze copy (select 1) to '{lake}/x.csv'", "one read-only statement at a time"),
        ("explain /* */ analyze copy (select 1) to '{lake}/x.csv'", "syntax error"),
        ("pragma memory_limit = '1GB'", "one read-only statement at a time"),
        ("set threads = 1", "one read-only statement at a time"),
        ("install spatial", "one read-only statement at a time"),
        ("load spatial", "one read-only statement at a time"),
        ("attach '{lake}/catalogue.db' as c (type sqlite)", "one read-only statement at a time"),
        ("call force_checkpoint()", "one read-only statement at a time"),
        ("select * from read_csv('/etc/passwd')", "file system operations are disabled"),
        ("select * from nowhere", "Table with name nowhere does not exist"),
        ("selec 1", "syntax error"),
    ],
)
def test_sql_reads_and_does_nothing_else(folder, capsys, query, sentence):
    lake = Lake.open(folder)
    create_tables(lake)
    before = files(folder.path)
    assert sentence in refused(capsys, "sql", query.format(lake=lake.folder))
    assert files(folder.path) == before


def test_features_are_listed_shown_and_checked(folder, capsys):
    assert main(["features", "check"]) == 0
    assert "features in 4 groups are well declared; hash " in capsys.readouterr().out
    assert main(["features", "list"]) == 0
    assert "note_num_views_6h" in capsys.readouterr().out
    assert main(["features", "show", "note_ctr_1d"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["expression"] == "num_clicks_1d / num_views_1d"
    assert shown["declared_in"].startswith("warehouse/models/blocks/_blocks.yml:")
    assert main(["features", "show", "user_last_clicks_30d"]) == 0
    assert json.loads(capsys.readouterr().out)["empty"] == []
    assert not folder.path.exists()  # a declaration is no state


def test_the_properties_of_features_are_what_the_declarations_say(folder, capsys, monkeypatch, tmp_path):
    assert main(["features", "document", "--check"]) == 0, "run `headrace features document` and commit what it writes"
    properties = (REPOSITORY / document.PROPERTIES).read_text()
    shutil.copytree(REPOSITORY / document.FOLDER, tmp_path / document.FOLDER)
    monkeypatch.setattr(document, "REPOSITORY", tmp_path)
    (tmp_path / document.PROPERTIES).write_text("version: 2\n")
    assert main(["features", "document", "--check"]) == 1
    assert "is not up to date: headrace features document" in capsys.readouterr().out
    assert main(["features", "document"]) == 0
    assert (tmp_path / document.PROPERTIES).read_text() == properties


@pytest.mark.parametrize("words", [["show", "note_num_vews_6h"], ["show"]])
def test_an_unknown_feature_is_refused(folder, capsys, words):
    assert "see `headrace features list`" in refused(capsys, "features", *words)


def test_exporting_before_building_says_what_to_run(folder, capsys):
    assert refused(capsys, "export-training") == "the lake has no training examples yet; run `dbt build` first"
    assert not any(folder.exports.iterdir())


def test_an_argument_that_is_not_one_is_refused(folder, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["land"])
    assert ended.value.code == 2
    assert "usage: headrace land" in capsys.readouterr().err
    assert main(["lnad"]) == 2
    assert "no command 'lnad'" in capsys.readouterr().err


def headrace(home: Home, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("headrace")), *words],
        cwd=home.path.parent,
        env={**os.environ, "HEADRACE_HOME": str(home.path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_installed_command_lands_and_reads_from_any_folder(home, events):
    landed = headrace(home, "land", events.name, "--landed-at", "event_ts")
    assert (landed.returncode, landed.stdout.splitlines()[0]) == (0, "events.ndjson: 2 events landed, 1 dead letters")
    read = headrace(home, "sql", "--json", "select count(*) as n from lake.events where event_type = 'click'")
    assert (read.returncode, read.stdout, read.stderr) == (0, '{"n": 1}\n', "")
    wrong = headrace(home, "sql", "drop table lake.events")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "headrace sql: one read-only statement at a time: select, from, describe, show or explain\n"


def test_a_reader_that_stops_early_is_no_error(home):
    command = f"{sys.executable} -m headrace.cli sql --json 'select * from range(100000)' | head -1"
    environment = {**os.environ, "HEADRACE_HOME": str(home.path)}
    shown = subprocess.run(command, shell=True, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert (shown.stdout, shown.stderr) == ('{"range": 0}\n', "")


def test_two_landings_of_one_file_at_once_land_it_once(home, events):
    command = [sys.executable, "-m", "headrace.cli", "land", "--json", str(events), "--delay", "2"]
    environment = {**os.environ, "HEADRACE_HOME": str(home.path)}
    both = [
        subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert sorted(json.loads(out)["already"] for out, _ in told) == [False, True]
    assert Lake.open(home).scan(EVENTS, "event_type <> 'heartbeat'").num_rows == 2


def mounts() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("mount") is not None


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, and a function that sets the size of that disk; unmounted afterwards."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mounts():
        pytest.skip("only root can mount a small disk: no space left is not tried")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("mount -t tmpfs is not permitted here: no space left is not tried")
    yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    subprocess.run(["umount", "--lazy", folder], check=True)  # the catalogue's connection pool may still be open


def test_a_full_disk_ends_with_a_sentence_and_the_same_command_completes_once_there_is_room(
    small_disk, monkeypatch, capsys, tmp_path
):
    disk, resize = small_disk
    monkeypatch.setenv("HEADRACE_HOME", str(disk / "home"))
    words = ["land", "--json", "simulator", "--users", "200", "--notes", "300", "--days", "3"]
    some_megabytes = simulate(num_users=200, num_notes=300, days=3)
    resize("12k")
    assert "no space is left on the disk of " in refused(capsys, *words)  # the catalogue
    for size in ("200k", "600k"):  # empty tables; some days of events
        resize(size)
        told = refused(capsys, *words)
        assert f"no space is left on the disk of {disk / 'home'}; no table was left half-written: make room there" in told
        lake = Lake.open(Home(disk / "home"))
        assert not lake.exists(EVENTS) or lake.table(EVENTS).current_snapshot() is None
    assert lake.exists(EVENTS)
    assert list(lake.folder.rglob("*.parquet"))  # it was the rows that found no room
    resize("100m")
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["num_events"] == some_megabytes.events.num_rows
    elsewhere = Lake.open(Home(tmp_path / "roomy"))
    land_dataset(elsewhere, some_megabytes)
    for name in (EVENTS, "lake.notes", "lake.users", "lake.dead_letters"):
        assert lake.scan(name).to_pylist() == elsewhere.scan(name).to_pylist(), name
