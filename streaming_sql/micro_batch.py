"""The feature SQL on a handful of events: the very text that dbt builds with, on an in-memory DuckDB.

Knows nothing of the log or the store: Arrow tables in, Arrow tables out. Not thread-safe.
"""

from collections.abc import Mapping

import duckdb
import pyarrow as pa

from streaming_sql.head import HeadEvent, head_events, head_sql
from streaming_sql.key_index import Key
from streaming_sql.plan import GroupPlan
from warehouse.errors import HeadraceError
from warehouse.events import EVENTS_SCHEMA
from warehouse.features.declarations import FeatureGroup
from warehouse.features.render import block_sql, staging_sql

STAGING_MODEL = "stg_engagements"
_INTEGERS = ("BIGINT", "INTEGER", "SMALLINT", "TINYINT", "HUGEINT", "UBIGINT", "UINTEGER", "USMALLINT", "UTINYINT")


class MicroBatch:
    """Compiled once per process: staging, blocks and head events of all groups."""

    def __init__(self, groups: Mapping[str, FeatureGroup]):
        """Raises HeadraceError if a group reads another staging model, or a fresh measure's `of` is not of its type."""
        self._groups = dict(groups)
        self._plans = {name: GroupPlan.of(group) for name, group in groups.items()}
        self._connection = duckdb.connect(config={"threads": 1})
        self._connection.execute("set TimeZone = 'UTC'")
        self._staging = staging_sql("arrived")
        self._blocks = {name: block_sql(group, "staged") for name, group in groups.items()}
        self._heads = {name: head_sql(groups[name], plan.fresh, "staged") for name, plan in self._plans.items() if plan.fresh}
        self.nothing = self.stage(EVENTS_SCHEMA.empty_table())
        for group in groups.values():
            self._check(group)

    def _check(self, group: FeatureGroup) -> None:
        if group.events != STAGING_MODEL:
            raise HeadraceError(
                f"{group.source}: feature group {group.name} reads {group.events}; the embedded runner stages "
                f"{STAGING_MODEL} only"
            )
        self._connection.register("staged", self.nothing)
        for measure in self._plans[group.name].fresh:
            if measure.of and measure.type == "bigint" and measure.aggregation != "count":
                (found,) = self._connection.sql(f"select {measure.of} as value from staged").types
                if str(found) not in _INTEGERS:
                    raise HeadraceError(
                        f"{group.source}: measure {measure.name}: {measure.of} is {found}, declared bigint; sums of rounded "
                        "values differ from rounded sums: declare type double, or cast in `of`"
                    )

    def stage(self, events: pa.Table) -> pa.Table:
        """First arrivals (EVENTS_SCHEMA) as rows of the staging model: typed, with `known_at`."""
        self._connection.register("arrived", events)
        return self._connection.execute(self._staging).to_arrow_table()

    def blocks(self, staged: pa.Table) -> dict[str, pa.Table]:
        """The block rows of every group from staged events."""
        self._connection.register("staged", staged)
        return {name: self._connection.execute(sql).to_arrow_table() for name, sql in self._blocks.items()}

    def heads(self, staged: pa.Table) -> dict[str, list[tuple[Key, HeadEvent]]]:
        """The head events of every group with fresh measures."""
        if staged.num_rows == 0:
            return {}
        self._connection.register("staged", staged)
        return {
            name: head_events(self._groups[name], self._connection.execute(sql).to_arrow_table())
            for name, sql in self._heads.items()
        }
