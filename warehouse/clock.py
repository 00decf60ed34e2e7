"""The one source of "now": the wall clock, a replay clock that lives in the past, or a clock a test moves by hand."""

import os
import time
from datetime import datetime

from warehouse.errors import HeadraceError

_STARTED_NS = "HEADRACE_CLOCK_STARTED_NS"


class Clock:
    """The wall clock, in microseconds since 1970-01-01 UTC."""

    def now_us(self) -> int:
        return time.time_ns() // 1000

    @staticmethod
    def from_env() -> "Clock":
        """`HEADRACE_CLOCK`: empty for the wall clock, or `2022-05-05T16:10:00Z` or `2022-05-05T16:10:00Z@60` to replay: from
        when the process starts, or from when `share` was called in the one that started it."""
        setting = os.environ.get("HEADRACE_CLOCK", "").strip()
        return ReplayClock.parse(setting, int(os.environ.get(_STARTED_NS) or time.monotonic_ns())) if setting else Clock()

    @staticmethod
    def share() -> None:
        """From here on, processes that this one starts replay as if they had started now: one clock for all of them."""
        os.environ.setdefault(_STARTED_NS, str(time.monotonic_ns()))


class ReplayClock(Clock):
    """Starts at a given instant when the process starts and runs on, `speed` times as fast as the wall."""

    def __init__(self, start_us: int, speed: float = 1.0, started_ns: int | None = None):
        """started_ns: of `time.monotonic_ns`, when it began to run; now by default."""
        if speed <= 0:
            raise ValueError(f"speed must be positive, got {speed}")
        self._start_us, self._speed = start_us, speed
        self._started_ns = time.monotonic_ns() if started_ns is None else started_ns

    @classmethod
    def parse(cls, text: str, started_ns: int | None = None) -> "ReplayClock":
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
        return cls(round(start.timestamp() * 1_000_000), rate, started_ns)

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
