"""How many requests a second a server sustains, and how late answers are at a share of it."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.serving.arrivals import Answers, Plan

FAILED_SHARE = 0.001
"""A rate is sustained while no more answers than this fail, are short, degraded or dropped from the log ..."""
SLOWEST_P99_MS = 250.0
"""... and 99 of 100 come within this time of when they were due, or within SLOWDOWN times of an unloaded server's median, where
that is longer."""
SLOWDOWN = 8.0
_SEARCHED = (0.5, 1.5)
"""Of what a closed loop reaches: where the capacity is looked for."""
_STEPS = 5
_REST_S, _LONGEST_REST_S = 2.0, 60.0
"""After each step, until all that it left to log is written: that is not the next one's load."""
_WARM_UP = 0.7
"""Of a steady rate, before it is measured."""
_OWED_S = 15.0
"""What came in so many seconds may wait to be logged at the end of a step: a batch is written once its first row is ten
seconds old. A server that owes more falls behind, and would drop rows once its queue is full."""
_LONGER, _LOWER, _TRIES = 2, 0.93, 10
"""How many steps long the rate that the search found is asked for again, as what a server owes shows late; how much less is
asked for where that is lost, and how often."""


@dataclass(frozen=True)
class Load:
    """What one server is asked, and for how long: seconds of each step of the search, and of the measurement."""

    readers: list[str]
    notes: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """unloaded_p50_ms: of one request at a time. capacity_per_s: held for held_s, the writing of its log included. rate_per_s:
    the share of it, at which latency was measured."""

    unloaded_p50_ms: float
    closed_loop_per_s: float
    capacity_per_s: float
    held_s: float
    share: float
    rate_per_s: float
    requests: int
    failed: int
    p50_ms: float
    p99_ms: float
    late_p99_ms: float
    stage_p50_ms: dict[str, float]

    def as_dict(self) -> dict:
        return asdict(self)


class Asker:
    """Runs plans against one port, each in a process of its own; readers go on where the last plan stopped. Rows of the forward
    log that a server drops count as answers that failed: it does not sustain what it cannot log."""

    def __init__(self, port: int, load: Load):
        self._port, self._load, self._asked, self._seed = port, load, 0, 0

    def ask(self, seconds: float, rate_per_s: float | None = None, clients: int = 1) -> Answers:
        self._seed += 1
        dropped = dropped_rows(self._port)
        plan = Plan(self._port, self._load.readers, seconds, self._load.notes, rate_per_s, clients, self._asked, self._seed)
        run = subprocess.run(
            [sys.executable, "-m", "bench.serving.arrivals"],
            input=json.dumps(asdict(plan)),
            capture_output=True,
            text=True,
            check=True,
        )
        answers = Answers(**json.loads(run.stdout))
        if rate_per_s is not None:
            answers.owed_s = _in_log(self._port, "waiting") / rate_per_s
        answers.failed += dropped_rows(self._port) - dropped
        self._asked += answers.offered
        return answers

    def rest(self) -> None:
        """Until the server has written its forward log, so that no step is charged for the one before it."""
        until_s = time.monotonic() + _LONGEST_REST_S
        time.sleep(_REST_S)
        while time.monotonic() < until_s and _in_log(self._port, "waiting"):
            time.sleep(0.5)


def measure(port: int, load: Load, share: float, tell=lambda line: None) -> Measured:
    """Warms up, searches the capacity by halving, asks for it longer, then measures at `share` of it. Raises RuntimeError if
    the server gives no full answer at all, or holds no rate near what a closed loop reaches."""
    asker = Asker(port, load)
    asker.ask(load.seconds / 4, clients=2)
    unloaded = asker.ask(load.seconds / 4)
    if not unloaded.latency_ms:
        raise RuntimeError(f"the server gave no full page of {load.notes} notes in {load.seconds / 4} s")
    unloaded_p50_ms = float(np.median(unloaded.latency_ms))
    slowest_ms = max(SLOWEST_P99_MS, SLOWDOWN * unloaded_p50_ms)
    closed = asker.ask(load.seconds / 4, clients=4)
    asker.rest()
    closed_per_s = len(closed.latency_ms) / closed.elapsed_s
    tell(f"one at a time {unloaded_p50_ms:.1f} ms; four at once {closed_per_s:.1f} feeds/s")

    def holds(rate: float, seconds: float) -> bool:
        answers = asker.ask(seconds, rate)
        asker.rest()
        p99_ms, it_held = _percentile(answers.latency_ms, 99), _sustained(answers, slowest_ms)
        owed = f", {answers.owed_s:.0f} s of rows to log" if answers.owed_s else ""
        said = "held" if it_held else "lost"
        tell(f"{rate:.1f}/s, {seconds:.0f} s: p99 {p99_ms:.1f} ms, {answers.failed} failed{owed}: {said}")
        return it_held

    low, high = (closed_per_s * edge for edge in _SEARCHED)
    for _ in range(_STEPS):
        rate = (low + high) / 2
        low, high = (rate, high) if holds(rate, load.seconds) else (low, rate)
    held_s = _LONGER * load.seconds
    capacity = next((rate for rate in (low * _LOWER**tried for tried in range(_TRIES)) if holds(rate, held_s)), None)
    if capacity is None:
        raise RuntimeError(f"{low * _LOWER ** (_TRIES - 1):.1f} requests a second were not held for {held_s:.0f} s")
    answers = asker.ask(load.seconds, capacity * share)
    p50_ms, p99_ms = (_percentile(answers.latency_ms, percent) for percent in (50, 99))
    tell(f"{capacity * share:.1f}/s, {share:.0%} of it: p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms, {answers.failed} failed")
    stages = sorted({stage for timings in answers.timings for stage in timings})
    return Measured(
        unloaded_p50_ms=unloaded_p50_ms,
        closed_loop_per_s=closed_per_s,
        capacity_per_s=capacity,
        held_s=held_s,
        share=share,
        rate_per_s=capacity * share,
        requests=answers.offered,
        failed=answers.failed,
        p50_ms=p50_ms,
        p99_ms=p99_ms,
        late_p99_ms=_percentile(answers.late_ms, 99),
        stage_p50_ms={stage: float(np.median([timings.get(stage, 0.0) for timings in answers.timings])) for stage in stages},
    )


def steady(port: int, load: Load, rate_per_s: float) -> dict[str, float]:
    """Latency at one rate, after a warm-up; milliseconds. Raises RuntimeError if no full answer comes."""
    asker = Asker(port, load)
    asker.ask(load.seconds / 4, rate_per_s * _WARM_UP)
    asker.rest()
    answers = asker.ask(load.seconds, rate_per_s)
    if not answers.latency_ms:
        raise RuntimeError(f"the server gave no full page of {load.notes} notes in {load.seconds} s")
    percentiles = {f"p{percent}_ms": _percentile(answers.latency_ms, percent) for percent in (50, 90, 99, 99.9, 100)}
    return {"rate_per_s": rate_per_s, "requests": answers.offered, "failed": answers.failed, **percentiles}


def dropped_rows(port: int) -> int:
    """Of the forward log, by all workers so far; 0 of a server that has none."""
    return _in_log(port, "dropped")


def _in_log(port: int, what: str) -> int:
    """Rows of the forward log that are `waiting`, or that were `dropped`, of all workers; 0 of a server that has none."""
    status = status_of(port)
    return 0 if status is None else sum(worker["forwardLog"][what] for worker in status.get("workers", [status]))


def status_of(port: int) -> dict[str, Any] | None:
    """What a server says of itself; None of the plain one, which says nothing. OSError if it does not answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/v1/status", timeout=20) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def _sustained(answers: Answers, slowest_ms: float) -> bool:
    is_in_time = _percentile(answers.latency_ms, 99) <= slowest_ms and answers.owed_s <= _OWED_S
    return is_in_time and answers.failed <= FAILED_SHARE * answers.offered


def _percentile(values: list[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else float("inf")
