"""How many requests a second a server sustains, and how late answers are at a share of it."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
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
_ANSWERS_WITHIN_S = 120.0
_WARM_UP = 0.7
"""Of a steady rate, before it is measured."""
_OWED_S = 15.0
"""What came in so many seconds may wait to be logged at the end of a step: a batch is written once its first row is ten
seconds old. A server that owes more falls behind, and would drop rows once its queue is full."""
_LONGER, _LOWER, _TRIES = 2, 0.93, 10
"""How many steps long the rate that the search found is asked for again, as what a server owes shows late; how much less is
asked for where that is lost, and how often."""
_PERCENTILES = (50, 90, 99, 99.9, 100)
_PROC_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Load:
    """What one server is asked, and for how long: step_s in each step of the search, measured_s for the latency."""

    readers: list[str]
    notes: int
    step_s: float
    measured_s: float


@dataclass(frozen=True)
class Latency:
    """At one rate. percentiles_ms: by their names, "99.9" and the like, of full answers. stolen: of the processors' time
    meanwhile, what the host of a virtual machine took; None where the system does not say. late_p99_ms: of the sending."""

    rate_per_s: float
    seconds: float
    requests: int
    failed: int
    percentiles_ms: dict[str, float]
    stolen: float | None
    late_p99_ms: float
    stage_p50_ms: dict[str, float]

    def as_text(self) -> str:
        told = ", ".join(f"{percent} {value:.1f}" for percent, value in self.percentiles_ms.items())
        stolen = "" if self.stolen is None else f"; {self.stolen:.1%} of the processors' time taken by the host"
        seconds = f"{self.rate_per_s:.1f} feeds/s for {self.seconds:.0f} s, {self.failed} of {self.requests} failed"
        return f"{seconds}; percentiles, ms: {told}{stolen}"


@dataclass(frozen=True)
class Measured:
    """unloaded_p50_ms: of one request at a time. capacity_per_s: held for held_s, the writing of its log included. latency: at
    a share of it."""

    unloaded_p50_ms: float
    closed_loop_per_s: float
    capacity_per_s: float
    held_s: float
    share: float
    latency: Latency


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
    asker.ask(load.step_s / 4, clients=2)
    unloaded = asker.ask(load.step_s / 4)
    if not unloaded.latency_ms:
        raise RuntimeError(f"the server gave no full page of {load.notes} notes in {load.step_s / 4} s")
    unloaded_p50_ms = float(np.median(unloaded.latency_ms))
    slowest_ms = max(SLOWEST_P99_MS, SLOWDOWN * unloaded_p50_ms)
    closed = asker.ask(load.step_s / 4, clients=4)
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
        low, high = (rate, high) if holds(rate, load.step_s) else (low, rate)
    held_s = _LONGER * load.step_s
    capacity = next((rate for rate in (low * _LOWER**tried for tried in range(_TRIES)) if holds(rate, held_s)), None)
    if capacity is None:
        raise RuntimeError(f"{low * _LOWER ** (_TRIES - 1):.1f} requests a second were not held for {held_s:.0f} s")
    latency = _latency(asker, load, capacity * share)
    tell(f"{share:.0%} of it: {latency.as_text()}")
    return Measured(unloaded_p50_ms, closed_per_s, capacity, held_s, share, latency)


def steady(port: int, load: Load, rate_per_s: float) -> Latency:
    """Latency at one rate, after a warm-up. Raises RuntimeError if no full answer comes."""
    asker = Asker(port, load)
    asker.ask(load.step_s / 4, rate_per_s * _WARM_UP)
    asker.rest()
    return _latency(asker, load, rate_per_s)


def _latency(asker: Asker, load: Load, rate_per_s: float) -> Latency:
    before = _processor_time()
    answers = asker.ask(load.measured_s, rate_per_s)
    after = _processor_time()
    if not answers.latency_ms:
        raise RuntimeError(f"the server gave no full page of {load.notes} notes in {load.measured_s} s")
    stages = sorted({stage for timings in answers.timings for stage in timings})
    return Latency(
        rate_per_s=rate_per_s,
        seconds=load.measured_s,
        requests=answers.offered,
        failed=answers.failed,
        percentiles_ms={f"{percent:g}": _percentile(answers.latency_ms, percent) for percent in _PERCENTILES},
        stolen=None if before is None or after is None else (after[1] - before[1]) / (after[0] - before[0]),
        late_p99_ms=_percentile(answers.late_ms, 99),
        stage_p50_ms={stage: float(np.median([timings.get(stage, 0.0) for timings in answers.timings])) for stage in stages},
    )


def _processor_time() -> tuple[int, int] | None:
    """Of all processors since the start, in the system's units: all of it, and what the host took (proc_stat(5)). None where
    the system is no Linux."""
    if not _PROC_STAT.exists():
        return None
    times = [int(part) for part in _PROC_STAT.read_text().partition("\n")[0].split()[1:9]]
    return sum(times), times[7]


def dropped_rows(port: int) -> int:
    """Of the forward log, by all workers so far; 0 of a server that has none."""
    return _in_log(port, "dropped")


def _in_log(port: int, what: str) -> int:
    """Rows of the forward log that are `waiting`, or that were `dropped`, of all workers; 0 of a server that has none."""
    status = status_of(port)
    return 0 if status is None else sum(worker["forwardLog"][what] for worker in status.get("workers", [status]))


def status_of(port: int) -> dict[str, Any] | None:
    """What a server says of itself; None of the plain one, which says nothing. OSError if it does not answer in two minutes:
    one that was asked for too much first computes what nobody waits for any more."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/v1/status", timeout=_ANSWERS_WITHIN_S) as answer:
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
