"""`headrace stream`: run, status and what they print."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from headrace.cli import main
from streaming_sql.open_log import open_log
from streaming_sql.settings import StreamSettings
from streaming_sql.status_view import watch
from warehouse.clock import Clock
from warehouse.home import Home
from warehouse.lake import Lake


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    for name in ("HEADRACE_CLOCK", "HEADRACE_EVENT_LOG", "HEADRACE_STREAM"):
        monkeypatch.delenv(name, raising=False)
    return Home.from_env()


def post(home, *event_ids):
    log = open_log(home, Lake.open(home), Clock())
    log.append([{"event_id": one, "event_type": "click", "user_id": "u1", "event_ts": Clock().now_us()} for one in event_ids])
    log.close()


def status(capsys):
    capsys.readouterr()
    assert main(["stream", "status", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_once_lands_what_waits_and_status_says_so(home, capsys):
    assert status(capsys)["log"] is None
    post(home, "e1", "e2")
    assert status(capsys)["log"]["num_not_landed"] == 2
    assert main(["stream", "run", "--once"]) == 0
    assert "caught up: " in capsys.readouterr().out
    after = status(capsys)
    assert after["log"]["num_not_landed"] == 0
    assert (after["runner"]["num_events"], after["runner"]["num_behind"]) == (2, 0)
    assert main(["stream", "status"]) == 0
    assert "events 2, late 0" in capsys.readouterr().out


def test_watch_shows_positions_counts_and_rates(home, capsys):
    post(home, "e1", "e2")
    assert main(["stream", "run", "--once"]) == 0
    post(home, "e3")
    capsys.readouterr()
    watch(home, Clock(), StreamSettings.from_env(), every_s=0.1, looks=2)
    shown = capsys.readouterr().out
    assert "events 2, late 0, duplicates 0, dead letters 0" in shown
    assert f"process {os.getpid()}" in shown
    (lake_row,) = [line.split() for line in shown.splitlines() if line.startswith("lake")]
    assert lake_row[3:] == ["1", "0"]  # one record not landed, none landing


def test_settings_come_from_a_file_and_the_environment_and_are_checked(home, tmp_path, monkeypatch, capsys):
    file = tmp_path / "stream.yml"
    monkeypatch.setenv("HEADRACE_STREAM", str(file))
    file.write_text("land_rows: 7\nland_age_s: 0.5\n")
    lander = StreamSettings.from_env().runner().lander
    assert (lander.rows, lander.age_us, lander.keep_bytes) == (7, 500_000, 2 * 1024**3)
    for text, said in (("land_row: 7", "land_row is not a stream setting"), ("land_rows: 1.5", "whole number above 0")):
        file.write_text(text)
        assert main(["stream", "status"]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.delenv("HEADRACE_STREAM")
    for url, said in (
        ("redis://x", "sqlite or kafka://"),
        ("kafka://x:1", "kafka://BROKER:PORT"),
        ("kafka://x:1/t?pw=secret", "no parameter pw"),
        ("kafka://x:1/t?partitions=0", "a number of at least 1"),
    ):
        monkeypatch.setenv("HEADRACE_EVENT_LOG", url)
        assert main(["stream", "run", "--once"]) == 2
        told = capsys.readouterr().err
        assert said in told
        assert "secret" not in told


def test_run_stops_on_sigterm_with_everything_landed(home, capsys):
    environment = {**os.environ, "HEADRACE_HOME": str(home.path)}
    child = subprocess.Popen(
        [sys.executable, "-m", "headrace.cli", "stream", "run"], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert any("running" in line for line in child.stdout)
    post(home, "e1", "e2", "e3")
    time.sleep(1.5)
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert "stopped" in out
    after = status(capsys)
    assert (after["log"]["num_not_landed"], after["runner"]["num_events"]) == (0, 3)


def test_a_running_stream_that_is_killed_again_and_again_loses_and_repeats_nothing(home, capsys):
    environment = {**os.environ, "HEADRACE_HOME": str(home.path)}
    posted = []
    for round_number in range(3):
        child = subprocess.Popen(
            [sys.executable, "-m", "headrace.cli", "stream", "run"], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert any("running" in line for line in child.stdout)
        ids = [f"{round_number}-{i}" for i in range(40)]
        post(home, *ids[:20])
        post(home, *ids[15:])
        posted += ids
        time.sleep(0.3 * round_number)
        child.kill()
        child.stdout.close()
        child.wait()
    assert main(["stream", "run", "--once"]) == 0
    after = status(capsys)
    assert (after["log"]["num_not_landed"], after["runner"]["num_events"]) == (0, len(posted))
    landed = Lake.open(home).scan("lake.events")
    assert sorted(one for one in landed["event_id"].to_pylist() if not one.startswith("heartbeat")) == sorted(posted)


@pytest.mark.parametrize("words", [["stream", "--help"], ["stream", "run", "--help"], ["stream", "status", "--help"]])
def test_help_has_examples(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    assert "headrace stream status --json" in capsys.readouterr().out


def test_a_word_it_does_not_know_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["stream", "walk"])
    assert stop.value.code == 2
    assert "invalid choice: 'walk'" in capsys.readouterr().err
