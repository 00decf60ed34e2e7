"""The feature SQL on a handful of events: the very text that dbt builds with, on an in-memory DuckDB.

Knows nothing of the log or the store: Arrow tables in, Arrow tables out. Not thread-safe.
"""

from collections.abc import Mapping
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from streaming_sql.head import HeadEvent, head_events, head_sql
from streaming_sql.key_index import Key
from streaming_sql.plan import GroupPlan
from warehouse.errors import HeadraceError
from warehouse.events import EVENTS_SCHEMA
from warehouse.features.declarations import FeatureGroup
from warehouse.features.render import admitted_sql, block_sql, retracted_sql, retractions_sql, staging_sql, standing_sql
from warehouse.time_algebra import FIVE_MINUTES_US

STAGING_MODEL = "stg_engagements"
_INTEGERS = ("BIGINT", "INTEGER", "SMALLINT", "TINYINT", "HUGEINT", "UBIGINT", "UINTEGER", "USMALLINT", "UTINYINT")


class _Given:
    """Arrow rows under one name for DuckDB, asked for anew by each execution of a statement that was prepared over them."""

    def __init__(self, schema: pa.Schema):
        self.rows = schema.empty_table()

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.rows.__arrow_c_stream__(requested_schema)


class MicroBatch:
    """Compiled once per process: staging, blocks and head events of all groups."""

    def __init__(self, groups: Mapping[str, FeatureGroup]):
        """Raises HeadraceError if a group reads another staging model, or a fresh measure's `of` is not of its type."""
        self._groups = dict(groups)
        self._plans = {name: GroupPlan.of(group) for name, group in groups.items()}
        self._connection = duckdb.connect(config={"threads": 1})
        self._connection.execute("set TimeZone = 'UTC'")
        self._attributes = next((group.attributes for group in groups.values()), ())
        for relation in self._attribute_types():
            self._create_attribute_table(relation)
        self._staging = staging_sql("arrived", attributes=self._attributes)
        self._blocks = {name: block_sql(group, "staged", "retracted") for name, group in groups.items()}
        self._standing = {name: standing_sql(group, "rows_of_ticks", "getvariable('tick')") for name, group in groups.items()}
        self._admitted = _Given(EVENTS_SCHEMA)
        self._prepare("stage", admitted_sql("admitted", self._attributes), "admitted", self._admitted)
        self.nothing = self.stage(EVENTS_SCHEMA.empty_table())
        self._fresh = _Given(self.nothing.schema)
        heads = {name: head_sql(groups[name], plan.fresh, "fresh") for name, plan in self._plans.items() if plan.fresh}
        for name, sql in heads.items():
            self._prepare(f"heads_of_{name}", sql, "fresh", self._fresh)
        self._heads = tuple(heads)
        self._nothing_retracted = self.stage_with_retractions(EVENTS_SCHEMA.empty_table())[1]
        for group in groups.values():
            self._check(group)

    def _check(self, group: FeatureGroup) -> None:
        if group.events != STAGING_MODEL:
            raise HeadraceError(
                f"{group.source}: feature group {group.name} reads {group.events}; the embedded runner stages "
                f"{STAGING_MODEL} only"
            )
        self._put("staged", self.nothing)
        for measure in self._plans[group.name].fresh:
            if measure.of and measure.type == "bigint" and measure.aggregation != "count":
                (found,) = self._connection.sql(f"select {measure.of} as value from staged").types
                if str(found) not in _INTEGERS:
                    raise HeadraceError(
                        f"{group.source}: measure {measure.name}: {measure.of} is {found}, declared bigint; sums of rounded "
                        "values differ from rounded sums: declare type double, or cast in `of`"
                    )

    def _attribute_types(self) -> dict[str, dict[str, str]]:
        """Of each table that adds to events, the types of the columns that are read."""
        types: dict[str, dict[str, str]] = {}
        for entry in self._attributes:
            read = types.setdefault(entry.relation, {})
            read |= {column: "varchar" for _, column in entry.keys}
            read |= {one.column: one.type for one in entry.columns}
            read |= dict.fromkeys((entry.valid_from, entry.available_at), "timestamptz")
        return types

    def _create_attribute_table(self, relation: str) -> None:
        columns = ", ".join(f'"{name}" {type_}' for name, type_ in self._attribute_types()[relation].items())
        self._connection.execute(f"create schema if not exists {relation.partition('.')[0]}")
        self._connection.execute(f"create or replace table {relation} ({columns})")

    def put_attributes(self, relation: str, rows: pa.Table) -> None:
        """What a table that adds to events holds from now on. rows: at least its columns that are read."""
        columns = ", ".join(f'"{name}"' for name in self._attribute_types()[relation])
        self._connection.register("given", rows)
        # a statement that was prepared over the table keeps a plan for what it held then, and DuckDB 1.5 answers by that plan
        self._create_attribute_table(relation)
        self._connection.execute(f"insert into {relation} select {columns} from given")
        self._connection.unregister("given")
        self._prepare("stage", admitted_sql("admitted", self._attributes), "admitted", self._admitted)

    def _put(self, name: str, rows: pa.Table) -> None:
        """A table of DuckDB's own: its joins push filters down that scans of Arrow tables do not know."""
        self._connection.register("given", rows)
        self._connection.execute(f"create or replace temp table {name} as select * from given")
        self._connection.unregister("given")

    def stage(self, events: pa.Table) -> pa.Table:
        """First arrivals (EVENTS_SCHEMA, none a duplicate of another) as rows of the staging model: typed, with `known_at`."""
        return self._executed("stage", self._admitted, events)

    def _prepare(self, name: str, sql: str, relation: str, given: _Given) -> None:
        """A statement that every round executes: planning costs a round of few events more than they do."""
        self._connection.register(relation, given)
        self._connection.execute(f"prepare {name} as {sql}")

    def _executed(self, name: str, given: _Given, rows: pa.Table) -> pa.Table:
        given.rows = rows
        return self._connection.execute(f"execute {name}").to_arrow_table()

    def stage_with_retractions(self, arrivals: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Arrivals (EVENTS_SCHEMA, duplicates and retractions among them) as rows of the staging model, and those of its rows
        that were retracted, with `retracted_at`."""
        self._connection.register("arrived", arrivals)
        staged = self._connection.execute(self._staging).to_arrow_table()
        self._put("staged", staged)
        self._connection.execute(f"create or replace temp table retractions as {retractions_sql('arrived')}")
        return staged, self._connection.execute(retracted_sql("staged", "retractions")).to_arrow_table()

    def blocks(self, staged: pa.Table) -> dict[str, pa.Table]:
        """The block rows of every group from staged events of which none is retracted."""
        self._put("staged", staged)
        self._put("retracted", self._nothing_retracted)
        return {name: self._connection.execute(sql).to_arrow_table() for name, sql in self._blocks.items()}

    def standing_blocks(self, staged: pa.Table, retracted: pa.Table, after_us: int, tick_us: int) -> dict[str, pa.Table]:
        """The block rows of every group that the ticks after after_us and up to tick_us bring, as they stand at tick_us.

        staged: the events that these ticks know first, and all events of blocks that they rebuild.
        """
        self._put("staged", staged)
        self._put("retracted", retracted)
        self._connection.execute(f"set variable tick = make_timestamptz({tick_us})")
        rows = {}
        for name, sql in self._blocks.items():
            self._connection.execute(
                f"create or replace temp table rows_of_ticks as select * from ({sql}) as made "
                f"where known_at > make_timestamptz({after_us}) and known_at <= getvariable('tick')"
            )
            rows[name] = self._connection.execute(self._standing[name]).to_arrow_table()
        return rows

    def blocks_as_if_known(self, staged: pa.Table, retracted: pa.Table, tick_us: int) -> dict[str, pa.Table]:
        """The rebuilt block rows of every group as if the tick knew every retraction already: of the staged events only those
        that it holds count."""
        self._put("retracted_later", retracted)
        now = f"make_timestamptz({tick_us + FIVE_MINUTES_US})"
        clamped = self._connection.execute(
            f"select * replace (least(retracted_at, {now}) as retracted_at) from retracted_later"
        ).to_arrow_table()
        held = staged.filter(pc.less_equal(staged["known_at"].cast(pa.int64()), tick_us))
        return self.standing_blocks(held, clamped, tick_us, tick_us + FIVE_MINUTES_US)

    def heads(self, staged: pa.Table) -> dict[str, list[tuple[Key, HeadEvent]]]:
        """The head events of every group with fresh measures."""
        if staged.num_rows == 0:
            return {}
        return {
            name: head_events(
                self._groups[name], self._plans[name].fresh, self._executed(f"heads_of_{name}", self._fresh, staged)
            )
            for name in self._heads
        }
