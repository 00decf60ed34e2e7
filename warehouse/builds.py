"""What a build leaves beside the rows, and how far the next one may go. Written by `dbt_plugin`, read by the plan.

Table properties hold the state (how far, by which definition, what each feature meant); the summary of each snapshot holds what
that build took. Both travel in the commit of the rows.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime

import duckdb
from pyiceberg.table import Table

from warehouse.errors import HeadraceError
from warehouse.features.meanings import changed
from warehouse.lake import BUILT_UNTIL
from warehouse.time_algebra import FIVE_MINUTES_US, closed_tick

DEFINITION = "headrace.definition"
"""Table property: a hash of the code and the declarations that built the table."""
MEANINGS = "headrace.meanings"
"""Table property: JSON, feature or measure → hash of what it means (`warehouse.features.meanings`)."""
BUILD_SECONDS = "headrace.build_seconds"
"""In a snapshot's summary: how long its rows took to compute and to write, before the commit."""


def built_until_of(table: Table) -> datetime | None:
    """The end (exclusive) of what is built; None if dbt never built the table."""
    text = table.properties.get(BUILT_UNTIL)
    return datetime.fromisoformat(text) if text else None


def known_meanings(table: Table) -> dict[str, str]:
    """What the table's features meant when they were built; empty for a table that says nothing of it."""
    return json.loads(table.properties.get(MEANINGS, "{}"))


def refuse_changed_meaning(name: str, before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Raises HeadraceError if a feature of the table kept its name and changed its meaning: models would read another quantity
    under a name that they were trained on."""
    if differ := changed(before, after):
        raise HeadraceError(
            f"{name}: {', '.join(differ)} changed meaning under the same name; what was trained on the old meaning would read "
            "the new one. Give the new meaning a name of its own (and keep or remove the old one), or accept it for good with "
            f"`dbt build --full-refresh --select {name.rpartition('.')[2]}+`; `headrace features plan` shows what that rebuilds"
        )


def closed_until(conn: duckdb.DuckDBPyConnection) -> datetime:
    """The end (exclusive, on the grid of ticks) of what may be built: the last closed tick plus five minutes.

    Every partition of the log must have spoken; until then nothing is closed.
    """
    read_through = conn.execute("select max(epoch_us(landed_at)) from lake.events group by log_partition").fetchall()
    partitions = conn.execute("select max(log_partition) + 1 from lake.events").fetchall()[0][0] or 0
    tick = closed_tick([row[0] for row in read_through]) if len(read_through) == partitions else None
    until_us = 0 if tick is None else tick + FIVE_MINUTES_US
    return datetime.fromtimestamp(until_us / 1_000_000, UTC)
