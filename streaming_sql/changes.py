"""What changes in a RisingWave view, as it happens: a subscription read through a cursor, over psycopg.

A subscription (`models/stream/*_changes.sql`) keeps changes for its retention; a reader that starts again says from when. No
other database has them, so this waits for a cluster to be run: `tests/risingwave`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from warehouse.errors import HeadraceError

ADDED, REMOVED = ("Insert", "UpdateInsert"), ("Delete", "UpdateDelete")
_LONGEST_WAIT_S = 60


@dataclass(frozen=True)
class Change:
    """A row of the view that came or went. changed_ms: RisingWave's clock, milliseconds; what to start from next time."""

    row: Mapping[str, Any]
    is_added: bool
    changed_ms: int


class Changes:
    """A cursor over one subscription. Not thread-safe."""

    def __init__(self, connection: psycopg.Connection[Any], subscription: str):
        self._connection, self._subscription = connection, subscription

    @classmethod
    @contextmanager
    def opened(cls, dsn: str, subscription: str, since_ms: int | None = None) -> Iterator["Changes"]:
        """From since_ms on, by RisingWave's clock; without, every row that is there and then what changes.

        Raises psycopg.Error if the cluster or the subscription is not there, or since_ms is past its retention.
        """
        since = sql.SQL("full") if since_ms is None else sql.SQL("since {}").format(sql.Literal(since_ms))
        name = sql.Identifier(*subscription.split("."))
        with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
            connection.execute(sql.SQL("declare changes subscription cursor for {} {}").format(name, since))
            yield cls(connection, subscription)

    def next(self, at_most: int = 1000, wait_s: int = 1) -> list[Change]:
        """The next changes in order; none if there was none within wait_s."""
        if not 0 < at_most <= 100_000 or not 0 < wait_s <= _LONGEST_WAIT_S:
            raise HeadraceError(f"at_most is 1 to 100,000 and wait_s 1 to {_LONGEST_WAIT_S}, got {at_most} and {wait_s}")
        text = sql.SQL("fetch {} from changes with (timeout = {})").format(sql.Literal(at_most), sql.Literal(f"{wait_s}s"))
        return [self._change(row) for row in self._connection.execute(text).fetchall()]

    def _change(self, row: dict[str, Any]) -> Change:
        op, changed_ms = row.pop("op"), int(row.pop("rw_timestamp"))
        if op not in (*ADDED, *REMOVED):
            raise HeadraceError(f"{self._subscription}: a change is one of {', '.join((*ADDED, *REMOVED))}, got {op!r}")
        return Change(row, op in ADDED, changed_ms)
