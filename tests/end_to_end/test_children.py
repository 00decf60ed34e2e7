"""Processes that a command starts end with it, at whatever moment it is told to stop."""

import os
import signal
import subprocess
import sys

import pytest

from headrace import children

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture(autouse=True)
def _exits_when_told():
    before = signal.getsignal(signal.SIGTERM)
    children.exit_when_told()
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_command_that_is_told_to_stop_while_it_starts_a_process_ends_it(monkeypatch):
    processes = []

    class ToldMeanwhile(subprocess.Popen):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            processes.append(self)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(children.subprocess, "Popen", ToldMeanwhile)
    with pytest.raises(SystemExit) as exit_, children.started(SLEEPER):
        pytest.fail("the block must not begin")
    assert exit_.value.code == 128 + signal.SIGTERM
    assert processes[0].returncode == -signal.SIGTERM


def test_a_process_ends_with_a_block_that_fails():
    with pytest.raises(ValueError, match="no"), children.started(SLEEPER) as process:
        raise ValueError("no")
    assert process.returncode == -signal.SIGTERM
