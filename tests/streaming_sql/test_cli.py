"""`headrace stream`: run, status and what they print."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from headrace.cli import main
from streaming_sql.cli import open_log
from warehouse.clock import Clock
from warehouse.home import Home
from warehouse.lake import Lake


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    monkeypatch.delenv("HEADRACE_CLOCK", raising=False)
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
