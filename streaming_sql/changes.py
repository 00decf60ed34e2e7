"""What changes in a RisingWave view, as it happens: a subscription read through a cursor, over psycopg.

A subscription (`models/streaming_sql/*_changes.sql`) keeps changes for its retention; whoever starts again says from when.
No other database has them. Source: https://docs.risingwave.com/serve/subscription.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import psycopg
from psycopg import sql

from streaming_sql.postgres_reader import ReaderSettings, connected
from warehouse.errors import HeadraceError

ADDED, REMOVED = ("Insert", "UpdateInsert"), ("Delete", "UpdateDelete")
_BESIDE = ("op", "rw_timestamp")
"""The last two columns of what a cursor gives, after those of the view."""
_LONGEST_WAIT_S = 60


@dataclass(frozen=True)
class Change:
    """A row of the view that came or went. changed_ms: RisingWave's clock, milliseconds, which is what to start from next time;
    None for a row that was there when the cursor was made."""

    row: Mapping[str, Any]
    is_added: bool
    changed_ms: int | None


class Changes:
    """A cursor over one subscription, on a connection of its own. Not thread-safe."""

    def __init__(self, connection: psycopg.Connection[tuple[Any, ...]], subscription: str, wait_s: int):
        """Use `open`."""
        self._connection, self._subscription, self._wait_s = connection, subscription, wait_s

    @classmethod
    def open(cls, dsn: str, subscription: str, since_ms: int | None = None, wait_s: int = 1) -> "Changes":
        """From since_ms on (included), by RisingWave's clock; without, every row that is there and then what changes.

        wait_s: how long `next` waits for a change; what should be there at once it awaits as `ReaderSettings` say.

        Raises psycopg.Error if the cluster or the subscription is not there, or since_ms is past its retention.
        """
        if not 0 < wait_s <= _LONGEST_WAIT_S:
            raise HeadraceError(f"wait_s must be 1 to {_LONGEST_WAIT_S} whole seconds, got {wait_s}")
        settings = ReaderSettings()
        since = sql.SQL("full") if since_ms is None else sql.SQL("since {}").format(sql.Literal(since_ms))
        name = sql.Identifier(*subscription.split("."))
        connection = connected(dsn, replace(settings, statement_timeout_s=settings.statement_timeout_s + wait_s))
        try:
            connection.prepare_threshold = None  # a cursor is read by plain statements
            connection.execute(sql.SQL("declare changes subscription cursor for {} {}").format(name, since))
        except BaseException:
            connection.close()
            raise
        return cls(connection, subscription, wait_s)

    def next(self, at_most: int = 1000) -> list[Change]:
        """The next changes in order; none if there was none within wait_s. Raises psycopg.Error if the cluster does not answer
        or no longer has what comes next."""
        if not 0 < at_most <= 100_000:
            raise HeadraceError(f"at_most must be 1 to 100,000, got {at_most}")
        text = sql.SQL("fetch {} from changes with (timeout = {})").format(
            sql.Literal(at_most), sql.Literal(f"{self._wait_s}s")
        )
        cursor = self._connection.execute(text)
        names = [column.name.rpartition(".")[2] for column in cursor.description or ()]  # some versions say `view.column`
        return [self._change(names, row) for row in cursor.fetchall()]

    def _change(self, names: list[str], row: tuple[Any, ...]) -> Change:
        *values, op, changed_ms = row
        if tuple(names[-2:]) != _BESIDE or op not in (*ADDED, *REMOVED):
            raise HeadraceError(
                f"{self._subscription}: a change ends with {' and '.join(_BESIDE)}, which is one of "
                f"{', '.join((*ADDED, *REMOVED))}; got {', '.join(names[-2:])} and {op!r}"
            )
        return Change(dict(zip(names, values, strict=False)), op in ADDED, changed_ms)

    def close(self) -> None:
        self._connection.close()
