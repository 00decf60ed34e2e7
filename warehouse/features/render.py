"""Renders the algebra's SQL macros outside dbt, so that every execution runs the very text that dbt builds with.

The macros in `warehouse/macros/algebra/` use plain Jinja only: no adapter, no graph, no `return`.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import jinja2

from warehouse.errors import HeadraceError
from warehouse.events import NUM_PARTITIONS
from warehouse.features.attributes import Attributes
from warehouse.features.declarations import FeatureGroup
from warehouse.features.measures import CALENDAR_PARTS, CalendarKey
from warehouse.home import REPOSITORY
from warehouse.time_algebra import DUPLICATE_MEMORY_US, FURTHEST_AHEAD_US, GRACE_US, SECOND_US

MACROS = REPOSITORY / "warehouse" / "macros" / "algebra"
TRAINING_MACROS = MACROS.with_name("training")
VARIABLES = {
    "grace_seconds": GRACE_US // SECOND_US,
    "duplicate_memory_seconds": DUPLICATE_MEMORY_US // SECOND_US,
    "furthest_ahead_seconds": FURTHEST_AHEAD_US // SECOND_US,
    "log_partitions": NUM_PARTITIONS,
}
"""The dbt variables of the same names; `tests/warehouse/test_render.py` holds them equal to `dbt_project.yml`."""


def _refuse(message: str) -> None:
    raise HeadraceError(message)


@cache
def _macros(dialect: str) -> Any:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, extensions=["jinja2.ext.do"], trim_blocks=False)
    environment.globals.update(
        target={"type": dialect},
        var=lambda name, default=None: VARIABLES.get(name, default),
        exceptions={"raise_compiler_error": _refuse},
    )
    text = "\n".join(path.read_text() for path in sorted(MACROS.glob("*.sql")))
    return environment.from_string(text).module


def macros_digest() -> str:
    """A short hash of the text of the macros that say what a table means: a change of any is a change of every table."""
    text = "\n".join(path.read_text() for folder in (MACROS, TRAINING_MACROS) for path in sorted(folder.glob("*.sql")))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def render_macro(macro: str, *arguments: Any, dialect: str = "duckdb", **keywords: Any) -> str:
    """The SQL text of one macro of the algebra."""
    return str(getattr(_macros(dialect), macro)(*arguments, **keywords)).strip()


def calendar_sql(key: CalendarKey, instant: str) -> str:
    """A calendar key of an instant (a SQL expression), as text."""
    return render_macro("calendar_part", {"field": CALENDAR_PARTS[key.part], "zone": key.zone}, instant)


def block_sql(group: FeatureGroup, events: str, retracted: str, dialect: str = "duckdb") -> str:
    """`select` of the group's 5-minute block rows from a relation with the columns of its staging model and those of its rows
    that were retracted (`retracted_sql`)."""
    return render_macro("block_rows", group.as_meta(), events, retracted, dialect=dialect)


def standing_sql(group: FeatureGroup, rows: str, tick: str) -> str:
    """`select` of the block rows that make up what is known at a tick (a SQL expression): none that a rebuilt row replaced."""
    return render_macro("standing_rows", group.as_meta(), rows, tick)


def roll_up_sql(group: FeatureGroup, child: str, minutes: int, dialect: str = "duckdb") -> str:
    """`select` of hour or day rows from the rows of a finer granularity."""
    return render_macro("rolled_up_rows", group.as_meta(), child, minutes, dialect=dialect)


def staging_sql(events: str, dialect: str = "duckdb", attributes: Sequence[Attributes] = ()) -> str:
    """`select` of typed first arrivals with their `known_at` from rows of `lake.events`. attributes: what the tables that they
    name add."""
    return render_macro("first_arrivals", events, dialect=dialect, attributes=_meta(attributes))


def admitted_sql(events: str, attributes: Sequence[Attributes] = ()) -> str:
    """`staging_sql` over rows of which none is a duplicate."""
    return render_macro("admitted_arrivals", events, attributes=_meta(attributes))


def _meta(attributes: Sequence[Attributes]) -> list[dict[str, Any]]:
    return [entry.as_meta() for entry in attributes]


def retractions_sql(events: str, dialect: str = "duckdb") -> str:
    """`select` of retractions, each event_id once, with the tick that first knows them, from rows of `lake.events`."""
    return render_macro("accepted_retractions", events, dialect=dialect)


def retracted_sql(events: str, retractions: str, dialect: str = "duckdb") -> str:
    """`select` of the staged events that were retracted, with `retracted_at`, from `staging_sql` and `retractions_sql`."""
    return render_macro("retracted_rows", events, retractions, dialect=dialect)


def shadowed_sql(events: str, attributes: Sequence[Attributes] = ()) -> str:
    """`select` of duplicates that a lagging reader takes for the first, with the positions that shadow them."""
    return render_macro("shadowed_arrivals", events, attributes=_meta(attributes))


def point_in_time_sql(
    group: FeatureGroup, spine: str, blocks: str, hours: str, days: str, events: str, shadowed: str, retractions: str
) -> str:
    """`select` of one row per spine row with the group's features as known at the row's own T and K."""
    return render_macro("point_in_time", group.as_meta(), spine, blocks, hours, days, events, shadowed, retractions)
