"""The demo, as a newcomer runs it, on a small simulated feed; and what it says where it cannot run."""

import fcntl
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from serving.parity import check_parity
from tests.end_to_end.stopping import leaves_nothing_behind
from tests.serving.hand_made import free_port
from warehouse.home import REPOSITORY, Home
from warehouse.lake import Lake

LEAST_VECTORS = 1000


def demo(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "headrace.cli", "demo", "--once", "--small", *words],
        cwd=REPOSITORY,
        env={**os.environ, "HEADRACE_HOME": str(home), "COLUMNS": "200", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    home = tmp_path_factory.mktemp("demo")
    return home, demo(home, "--port", str(free_port()))


@pytest.mark.timeout(600)
def test_the_demo_ends_well_and_every_served_value_agrees_with_the_lake(first, capsys):
    home, finished = first
    assert finished.returncode == 0, finished.stdout
    assert finished.stdout.count("feed of user") == 3
    assert re.search(r"user_num_clicks_\w+ of user \S+, in the very next request: \S+ → \S+", finished.stdout)
    assert re.search(r"note_num_clicks_\w+ of note \S+, at the next tick: \S+ → \S+", finished.stdout)
    parity = check_parity(Lake.open(Home(home)))
    with capsys.disabled():
        print(f"\n{parity.as_text()}")
    assert parity.num_vectors >= LEAST_VECTORS
    assert parity.num_equal_values == parity.num_values


@pytest.mark.timeout(600)
def test_a_second_demo_lands_and_trains_nothing_again(first):
    home, _ = first
    before = Lake.open(Home(home)).scan("lake.events", "landing = 'declared'").num_rows
    finished = demo(home, "--port", str(free_port()))
    assert finished.returncode == 0, finished.stdout
    assert "had landed before; nothing was added" in finished.stdout
    assert "models are there already, judged in" in finished.stdout
    assert Lake.open(Home(home)).scan("lake.events", "landing = 'declared'").num_rows == before


def test_a_port_in_use_is_said_before_anything_is_done(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        finished = demo(tmp_path / "home", "--port", str(server.getsockname()[1]))
    assert finished.returncode == 2
    assert "Address already in use); choose another" in finished.stdout
    assert not (tmp_path / "home" / "lake").exists()


def test_a_second_demo_at_once_is_refused(tmp_path):
    with open(tmp_path / "demo.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        finished = demo(tmp_path)
    assert finished.returncode == 2
    assert "another demo runs on" in finished.stdout


def test_a_demo_that_is_told_to_stop_leaves_no_process_behind(tmp_path):
    leaves_nothing_behind(tmp_path, "demo", "--small", "--port", str(free_port()))


def test_a_missing_data_folder_is_named(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-m", "headrace.cli", "land", "kuairand"],
        env={**os.environ, "HEADRACE_HOME": str(tmp_path / "home"), "HEADRACE_DATA": str(tmp_path / "nothing")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 2
    assert str(tmp_path / "nothing") in finished.stderr
    assert "Traceback" not in finished.stderr
