"""Waiting for a new tick of a RisingWave cluster: told by the subscription on the tick view, else by the clock.

The subscription only spares asking. Where there is none (PostgreSQL has no such statement), or while it fails, whoever waits is
woken every so often to ask the view.
"""

import logging
import math
import threading
import time
from collections.abc import Sequence

import psycopg

from streaming_sql.changes import Change, Changes
from streaming_sql.records import to_us
from warehouse.errors import HeadraceError

_LOG = logging.getLogger("headrace.stream")
SUBSCRIPTION, _TICK = "closed_tick_changes", "closed_tick"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
"""Before the subscription is tried again; it doubles each time."""


class TickNews:
    """One thread waits."""

    def __init__(self, dsn: str, look_s: float):
        """look_s: how often to wake without a subscription, seconds."""
        self._dsn, self._look_s = dsn, look_s
        self._changes: Changes | None = None
        self._since_ms: int | None = None
        self._tick_us = 0
        self._pause_s, self._try_at_s = _FIRST_PAUSE_S, 0.0
        self._said: bool | None = None
        """Whether the log was last told that the subscription tells, or that it does not."""

    def wait(self, stopping: threading.Event) -> int | None:
        """The newest tick that the subscription has told, microseconds (0: none is closed), at once if it is new, else after a
        second. Where it does not tell, None after look_s or when `stopping` is set: the view must then be asked."""
        try:
            if self._changes is None and time.monotonic() >= self._try_at_s:
                self._changes = Changes.open(self._dsn, SUBSCRIPTION, self._since_ms)
            if self._changes is not None:
                self._note(self._changes.next())
                return self._tick_us
        except (psycopg.Error, HeadraceError) as error:
            self._lost(error)
        stopping.wait(self._look_s)
        return None

    def close(self) -> None:
        if self._changes is not None:
            self._changes.close()
        self._changes = None

    def _note(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.is_added:
                tick = change.row[_TICK]
                self._tick_us = 0 if tick is None else to_us(tick)
            self._since_ms = change.changed_ms
        self._pause_s = _FIRST_PAUSE_S
        if not self._said:
            self._said = True
            _LOG.info("new ticks are told by the subscription %s", SUBSCRIPTION)

    def _lost(self, error: Exception) -> None:
        self.close()
        if not isinstance(error, psycopg.OperationalError):
            self._since_ms = None  # what comes next may be gone: the view's row says as much
        has_none = isinstance(error, psycopg.errors.SyntaxError)
        self._try_at_s = math.inf if has_none else time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        if self._said is not False:
            self._said = False
            why = "the database has no subscriptions" if has_none else " ".join(str(error).split())
            _LOG.info(
                "ticks are asked for every %g s, as the subscription %s does not tell: %s", self._look_s, SUBSCRIPTION, why
            )
