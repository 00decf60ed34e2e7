"""The one source of "now": the wall clock, a replay clock that lives in the past, or a clock a test moves by hand."""

import os
import time
from datetime import datetime

from warehouse.errors import HeadraceError


class Clock:
    """The wall clock, in microseconds since 1970-01-01 UTC."""

    def now_us(self) -> int:
        return time.time_ns() // 1000

    @staticmethod
    def from_env() -> "Clock":
        """`HEADRACE_CLOCK`: empty for the wall clock, or `2022-05-05T16:10:00Z` or `2022-05-05T16:10:00Z@60` to replay."""
        setting = os.environ.get("HEADRACE_CLOCK", "").strip()
        return ReplayClock.parse(setting) if setting else Clock()


class ReplayClock(Clock):
    """Starts at a given instant when the process starts and runs on, `speed` times as fast as the wall."""

    def __init__(self, start_us: int, speed: float = 1.0):
        if speed <= 0:
            raise ValueError(f"speed must be positive, got {speed}")
        self._start_us, self._speed, self._started_ns = start_us, speed, time.monotonic_ns()

    @classmethod
    def parse(cls, text: str) -> "ReplayClock":
        instant, _, speed = text.partition("@")
        try:
            start = datetime.fromisoformat(instant.replace("Z", "+00:00"))
            rate = float(speed) if speed else 1.0
        except ValueError:
            raise HeadraceError(
                f"HEADRACE_CLOCK must look like 2022-05-05T16:10:00Z or 2022-05-05T16:10:00Z@60, got {text!r}"
            ) from None
        if start.tzinfo is None:
            raise HeadraceError(f"HEADRACE_CLOCK needs a zone, got {text!r}; write {instant}Z for UTC")
        return cls(round(start.timestamp() * 1_000_000), rate)

    def now_us(self) -> int:
        return self._start_us + int((time.monotonic_ns() - self._started_ns) * self._speed) // 1000


class ManualClock(Clock):
    """Stands still until `advance_us`: for tests."""

    def __init__(self, start_us: int):
        self._now_us = start_us

    def now_us(self) -> int:
        return self._now_us

    def advance_us(self, by_us: int) -> None:
        self._now_us += by_us
