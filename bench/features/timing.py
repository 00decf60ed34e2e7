"""Seconds by the clock on the wall and by the processor, in turn: other work on the machine hits both."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spent:
    """Seconds of runs of the same work. Processor seconds are user and system, over all threads and child processes."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def wall_s(self) -> float:
        return min(self.wall)

    @property
    def cpu_s(self) -> float:
        return min(self.cpu)

    @property
    def median_wall_s(self) -> float:
        return statistics.median(self.wall)

    @property
    def median_cpu_s(self) -> float:
        return statistics.median(self.cpu)

    def __add__(self, other: "Spent") -> "Spent":
        """Work after work, at its fastest."""
        return Spent((self.wall_s + other.wall_s,), (self.cpu_s + other.cpu_s,))


def in_turn(calls: Mapping[str, Callable[[], Any]], repeat: int) -> tuple[dict[str, Spent], dict[str, Any]]:
    """Runs every call `repeat` times, A B A B: what each took, and its last answer."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    answers: dict[str, Any] = {}
    for _ in range(repeat):
        for name, call in calls.items():
            answers.pop(name, None)
            wall_s, cpu_s = time.perf_counter(), _cpu_s()
            answers[name] = call()
            spent[name].append((time.perf_counter() - wall_s, _cpu_s() - cpu_s))
    return {name: Spent(*map(tuple, zip(*found, strict=True))) for name, found in spent.items()}, answers


def timed(call: Callable[[], Any], repeat: int = 1) -> tuple[Spent, Any]:
    spent, answers = in_turn({"it": call}, repeat)
    return spent["it"], answers["it"]


def _cpu_s() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
