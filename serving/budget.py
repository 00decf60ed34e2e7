"""The time of a request: how much of it is left, and what the stages ahead are likely to need.

The deadline travels with the request from the moment it arrives, so that waiting in line counts. What cannot be done in time is
skipped in a fixed order (`cascade.feed_path`), and the answer says what.
"""

import math
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

_WEIGHT = 0.1
"""Of the newest measurement in a running mean."""
_FORGET = 0.9
"""What is left of an expectation each time its stage was skipped for it: so that a stage is tried again after a slow spell."""


class Pace:
    """How long stages take on this machine lately: a running mean per stage, in milliseconds per candidate and at least
    `_LEAST` candidates' worth, as small batches cost about the same. Safe from several threads."""

    _LEAST = 100

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._per_candidate: dict[str, float] = {}

    def note(self, stage: str, took_ms: float, num_candidates: int) -> None:
        per_candidate = took_ms / max(num_candidates, self._LEAST)
        with self._lock:
            known = self._per_candidate.get(stage)
            self._per_candidate[stage] = per_candidate if known is None else known + _WEIGHT * (per_candidate - known)

    def expected_ms(self, stages: Iterable[str], num_candidates: int) -> float:
        """For all of the stages together; 0 of what was never measured."""
        with self._lock:
            return sum(self._per_candidate.get(stage, 0.0) for stage in stages) * max(num_candidates, self._LEAST)

    def most_candidates(self, stages: Iterable[str], within_ms: float) -> int | None:
        """How many candidates the stages can take within that time; None for any number."""
        with self._lock:
            per_candidate = sum(self._per_candidate.get(stage, 0.0) for stage in stages)
        return None if per_candidate == 0.0 or math.isinf(within_ms) else max(int(within_ms / per_candidate), 0)

    def skipped(self, stage: str) -> None:
        with self._lock:
            if stage in self._per_candidate:
                self._per_candidate[stage] *= _FORGET


@dataclass(frozen=True)
class Budget:
    """deadline: of `time.perf_counter`, seconds; infinite for no deadline. company: how many requests are computed side by
    side in the time that is left, itself included."""

    deadline: float = float("inf")
    company: int = 1

    @classmethod
    def of_ms(cls, milliseconds: float) -> "Budget":
        """From now on."""
        return cls(time.perf_counter() + milliseconds / 1000)

    def within(self, company: int) -> "Budget":
        return replace(self, company=company)

    def left_ms(self) -> float:
        """Its own part of the time that is left."""
        return (self.deadline - time.perf_counter()) * 1000 / self.company
