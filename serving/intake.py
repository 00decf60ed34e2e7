"""Back-pressure for posted events: how many may wait for the log, and how large it may grow, before clients must wait."""

import threading
import time

from streaming_sql.event_log import Log

_LOOK_EVERY_S = 1.0


class Intake:
    """Counts events between their check and their acknowledgement. Nothing that was taken is dropped; more is not taken."""

    def __init__(self, most_waiting: int, most_log_bytes: int):
        self._most_waiting, self._most_log_bytes = most_waiting, most_log_bytes
        self._lock, self._waiting = threading.Lock(), 0
        self._log_bytes, self._looked_s = 0, float("-inf")

    @property
    def num_waiting(self) -> int:
        return self._waiting

    def why_not(self, num_events: int, log: Log) -> tuple[str, int] | None:
        """Why these must come again later and in how many seconds; None once they are let in, and then call `done`."""
        if time.monotonic() - self._looked_s > _LOOK_EVERY_S:
            self._log_bytes, self._looked_s = log.num_bytes() or 0, time.monotonic()
        if self._log_bytes > self._most_log_bytes:
            return f"the event log holds {self._log_bytes} bytes, more than {self._most_log_bytes}: landing does not keep up", 5
        with self._lock:
            # one batch alone is always let in, however large, or it could never come
            if self._waiting and self._waiting + num_events > self._most_waiting:
                return f"{self._waiting} events wait for the log already; at most {self._most_waiting} may", 1
            self._waiting += num_events
        return None

    def done(self, num_events: int) -> None:
        with self._lock:
            self._waiting -= num_events
