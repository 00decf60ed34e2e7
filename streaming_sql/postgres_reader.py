"""Reads from a server that speaks PostgreSQL's protocol (RisingWave does): few connections, bounded waits, reads repeated.

Only statements that read: repeating one after a broken connection changes nothing. Knows nothing of features.
"""

import contextlib
import logging
import queue
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen

from warehouse.errors import HeadraceError

_LOG = logging.getLogger("headrace.stream")
_T = TypeVar("_T")
_SLACK_S = 0.05
"""How much longer the reader waits than the server, so that it hears of the server's own timeout."""


@dataclass(frozen=True)
class ReaderSettings:
    """How long to wait, and how often."""

    connections: int = 2
    connect_timeout_s: int = 2
    statement_timeout_s: float = 5.0
    """The server gives up a statement after this; the reader gives up a server that is silent for longer."""
    attempts: int = 4
    first_pause_s: float = 0.1
    """Before the second attempt; it doubles with each."""
    no_attempt_after_s: float = float("inf")
    """Of the first: what has waited so long does not wait again."""


class _Bounded(psycopg.Connection):
    """Waits no longer than this for any answer: a server that hangs closes no connection, and its kernel answers probes."""

    longest_wait_s: float | None = None

    def wait(self, gen: PQGen[_T], interval: float = 0.1, timeout: float | None = None) -> _T:
        return super().wait(gen, interval, self.longest_wait_s if timeout is None else timeout)


class PostgresReader:
    """A pool of connections that are opened when they are needed and thrown away when they break. Thread-safe."""

    def __init__(self, dsn: str, settings: ReaderSettings | None = None):
        """Raises HeadraceError, which does not repeat it, if dsn is no connection string."""
        self._dsn, self._settings = dsn, settings or ReaderSettings()
        self._where = _where(dsn)
        self._idle: queue.LifoQueue[psycopg.Connection | None] = queue.LifoQueue()
        for _ in range(self._settings.connections):
            self._idle.put(None)
        self.num_repeated = 0
        """Attempts that came after a failed one."""

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """`fetch`, each row by the names of its columns."""
        names, rows = self.fetch(sql, parameters)
        return [dict(zip(names, row, strict=True)) for row in rows]

    def fetch(self, sql: str, parameters: Sequence[Any] = ()) -> tuple[list[str], list[tuple[Any, ...]]]:
        """The names of its columns and all rows of one statement, all of one snapshot. Raises HeadraceError, saying where and
        why, when every attempt failed, and at once where the statement itself is wrong."""
        pause_s, began = self._settings.first_pause_s, time.monotonic()
        for attempt in range(1, self._settings.attempts + 1):
            try:
                return self._once(sql, parameters)
            except (psycopg.OperationalError, psycopg.InterfaceError, queue.Empty) as error:
                why = " ".join(str(error).split()) or "all connections are in use"
                is_too_late = time.monotonic() - began > self._settings.no_attempt_after_s
                if attempt == self._settings.attempts or is_too_late:
                    raise HeadraceError(f"{self._where} did not answer in {attempt} attempts: {why}") from error
                _LOG.warning("%s: %s; trying again", self._where, why)
                self.num_repeated += 1
                time.sleep(pause_s * random.uniform(0.5, 1.5))
                pause_s *= 2
            except psycopg.Error as error:
                raise HeadraceError(f"{self._where} refuses the statement: {' '.join(str(error).split())}") from error
        raise AssertionError("unreachable")

    def _once(self, sql: str, parameters: Sequence[Any]) -> tuple[list[str], list[tuple[Any, ...]]]:
        connection = self._idle.get(timeout=self._settings.statement_timeout_s)
        try:
            if connection is None or connection.closed:
                connection = connected(self._dsn, self._settings)
            cursor = connection.execute(sql, parameters)
            return [column.name for column in cursor.description or ()], cursor.fetchall()
        except BaseException:
            if connection is not None:
                connection.close()
            connection = None
            raise
        finally:
            self._idle.put(connection)

    def close(self) -> None:
        """Closes what is idle; nothing is read from then on."""
        with contextlib.suppress(queue.Empty):
            while True:
                connection = self._idle.get_nowait()
                if connection is not None:
                    connection.close()


def connected(dsn: str, settings: ReaderSettings) -> psycopg.Connection[tuple[Any, ...]]:
    """A new connection in UTC, without transactions, that waits no longer than the settings say. Raises psycopg.Error."""
    milliseconds = round(settings.statement_timeout_s * 1000)
    connection = _Bounded.connect(
        dsn,
        autocommit=True,
        connect_timeout=settings.connect_timeout_s,
        # a server that is gone without a word is noticed by the probes, not by waiting
        keepalives_idle=1,
        keepalives_interval=1,
        keepalives_count=3,
        tcp_user_timeout=milliseconds,
    )
    connection.longest_wait_s = settings.statement_timeout_s + _SLACK_S
    connection.execute(f"set statement_timeout = {milliseconds}")
    connection.execute("set time zone 'UTC'")
    return connection


def _where(dsn: str) -> str:
    try:
        given = psycopg.conninfo.conninfo_to_dict(dsn)
    except psycopg.Error:  # it would say the part that it cannot read, which may be a password
        raise HeadraceError("the database's address is no connection string: neither `key=value …` nor a URL") from None
    return f"the database at {given.get('host', 'localhost')}:{given.get('port', 5432)}/{given.get('dbname', '')}"
