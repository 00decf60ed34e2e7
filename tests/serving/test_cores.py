"""Which cores a worker keeps to, and that all its threads do."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.cores import WORKERS, keep_to_own, share_of

A_WORKER = """
import json, os, sys, threading
from serving.cores import keep_to_own
ends = threading.Event()
before = threading.Thread(target=ends.wait)
before.start()
kept = keep_to_own(int(sys.argv[1]))
after = threading.Thread(target=ends.wait)
after.start()
found = [sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")]
ends.set()
print(json.dumps([sorted(kept), found]))
"""


def kept_by(worker, workers):
    """(the share, the cores of each of three threads) of a process."""
    environment = {name: value for name, value in os.environ.items() if name != WORKERS} | workers
    run = subprocess.run([sys.executable, "-c", A_WORKER, str(worker)], env=environment, capture_output=True, check=True)
    return json.loads(run.stdout)


@given(st.sets(st.integers(0, 127), min_size=1), st.integers(1, 64))
def test_each_core_is_of_one_worker_unless_there_are_more_workers(cores, workers):
    shares = [share_of(worker, workers, cores) for worker in range(workers)]
    assert all(shares)
    assert set().union(*shares) == cores
    if workers <= len(cores):
        assert sum(map(len, shares)) == len(cores)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    else:
        assert {len(share) for share in shares} == {1}
    assert share_of(workers, workers, cores) == shares[0]  # of a number that is too large


@pytest.mark.skipif(sys.platform != "linux", reason="threads are kept to cores on Linux only")
def test_threads_from_before_and_after_keep_to_it():
    allowed = os.sched_getaffinity(0)
    for worker in (0, 1):
        share = sorted(share_of(worker, 2, allowed))
        assert kept_by(worker, {WORKERS: "2"}) == [share, [share] * 3]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are kept to cores on Linux only")
@pytest.mark.parametrize("workers", [{}, {WORKERS: "1"}, {WORKERS: "many"}])
def test_they_run_on_any_where_nobody_says_how_many_workers_there_are(workers):
    allowed = sorted(os.sched_getaffinity(0))
    assert kept_by(0, workers) == [[], [allowed] * 3]


def test_a_sandbox_that_forbids_it_is_told_and_endured(monkeypatch, caplog):
    def forbidden(thread, cores):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setenv(WORKERS, "2")
    monkeypatch.setattr(os, "sched_setaffinity", forbidden, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setattr(os, "listdir", lambda folder: ["1"])
    assert keep_to_own(0) == set()
    assert "any core" in caplog.text


def test_elsewhere_nothing_is_asked(monkeypatch):
    monkeypatch.setenv(WORKERS, "2")
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert keep_to_own(0) == set()
