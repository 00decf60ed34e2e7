"""What a run found: comparisons, facts and the machine, as a table or as JSON."""

import os
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from bench.features.timing import Spent


@dataclass(frozen=True)
class Row:
    """One comparison of ours with a peer; a ratio is peer / ours, above 1 we are faster."""

    what: str
    size: str
    ours: Spent
    peer: Spent
    must: float | None = None

    @property
    def ratio(self) -> float:
        return self.peer.wall_s / self.ours.wall_s

    @property
    def cpu_ratio(self) -> float:
        return self.peer.cpu_s / max(self.ours.cpu_s, 1e-9)

    @property
    def median_ratio(self) -> float:
        return self.peer.median_wall_s / self.ours.median_wall_s

    @property
    def median_cpu_ratio(self) -> float:
        return self.peer.median_cpu_s / max(self.ours.median_cpu_s, 1e-9)

    def as_json(self) -> dict[str, Any]:
        ratios = {name: round(getattr(self, name), 3) for name in ("ratio", "cpu_ratio", "median_ratio", "median_cpu_ratio")}
        times = {
            who: {"wall_s": [round(one, 3) for one in spent.wall], "cpu_s": [round(one, 3) for one in spent.cpu]}
            for who, spent in (("ours", self.ours), ("peer", self.peer))
        }
        return {"what": self.what, "size": self.size, **times, **ratios, "must": self.must}


@dataclass
class Report:
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"machine": self.machine, "facts": self.facts, "rows": [row.as_json() for row in self.rows]}


def machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": [round(load, 1) for load in os.getloadavg()],
        "python": platform.python_version(),
        "duckdb": duckdb.__version__,
        "numpy": np.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_report(report: Report) -> None:
    print(", ".join(f"{name} {value}" for name, value in report.machine.items()))
    for fact in report.facts:
        print(fact)
    if not report.rows:
        return
    width = max(len(row.what) for row in report.rows)
    sizes = max(len(row.size) for row in report.rows)
    print("least seconds of each, by the clock and by the processor (all threads and child processes); ratios are peer / ours")
    head = f"{'ours / peer':<{width}}  {'size':<{sizes}}  {'ours s':>8} {'cpu':>8}  {'peer s':>8} {'cpu':>8}"
    print(f"{head}  {'ratio':>7} {'median':>7}  {'by cpu':>7} {'median':>7}  must")
    for row in report.rows:
        must = "" if row.must is None else f"{row.must:.2f} {'met' if row.ratio >= row.must else 'MISSED'}"
        times = "  ".join(f"{spent.wall_s:8.2f} {spent.cpu_s:8.2f}" for spent in (row.ours, row.peer))
        ratios = f"{row.ratio:6.2f}x {row.median_ratio:6.2f}x  {row.cpu_ratio:6.2f}x {row.median_cpu_ratio:6.2f}x"
        print(f"{row.what:<{width}}  {row.size:<{sizes}}  {times}  {ratios}  {must}")
