"""The lake's blocks into a new online store, in one read per feature group."""

from collections.abc import Mapping

import pyarrow as pa

from streaming_sql.plan import GroupPlan
from streaming_sql.records import to_us
from warehouse.errors import HeadraceError
from warehouse.features.declarations import FeatureGroup
from warehouse.features.render import standing_sql
from warehouse.lake import BUILT_UNTIL, Lake
from warehouse.landing import EVENTS
from warehouse.time_algebra import FIVE_MINUTES_US, closed_tick


def blocks_in_lake(lake: Lake, groups: Mapping[str, FeatureGroup]) -> tuple[int, dict[str, pa.Table]]:
    """The newest tick that every group's table holds in full and the log had closed, and the rows that stand at it and
    some window can still reach. Tick 0 and nothing where a table is missing or unbuilt: then everything is replayed."""
    tick_us = newest_built_tick(lake, groups)
    if tick_us <= 0:
        return 0, {}
    blocks = {}
    with lake.duckdb() as connection:
        for name, group in groups.items():
            standing = standing_sql(group, f'features."{name}"', "make_timestamptz($tick_us)")
            blocks[name] = connection.execute(
                f"select * from ({standing}) as standing where block_start >= make_timestamptz($from_us)",
                {"tick_us": tick_us, "from_us": GroupPlan.of(group).keep_from_us(tick_us)},
            ).to_arrow_table()
    return tick_us, blocks


def newest_built_tick(lake: Lake, groups: Mapping[str, FeatureGroup]) -> int:
    """The newest tick that every group's table holds in full and the landed part of the log had closed; 0 or less for none."""
    return min([*(_built_through(lake, group) for group in groups.values()), _closed(lake)])


def _built_through(lake: Lake, group: FeatureGroup) -> int:
    """The newest tick whose rows are all there; 0 for none. Raises HeadraceError if another declaration built the table."""
    name = f"features.{group.name}"
    if not lake.exists(name) or BUILT_UNTIL not in (table := lake.table(name)).properties:
        return 0
    columns = {field.name for field in table.schema().fields}
    declared = [
        *group.keys,
        "block_start",
        "known_at",
        "is_rebuilt",
        *(column for measure in group.measures for column in measure.columns),
    ]
    if missing := [column for column in declared if column not in columns]:
        raise HeadraceError(f"{name} was built from another declaration and has no {', '.join(missing)}: run `dbt build` first")
    return to_us(table.properties[BUILT_UNTIL]) - FIVE_MINUTES_US


def _closed(lake: Lake) -> int:
    """The last tick that the landed part of the log closes; 0 while a partition is silent."""
    if not lake.exists(EVENTS) or lake.table(EVENTS).current_snapshot() is None:
        return 0
    with lake.duckdb() as connection:
        landed = connection.execute("select max(epoch_us(landed_at)) from lake.events group by log_partition").fetchall()
        partitions = connection.execute("select max(log_partition) + 1 from lake.events").fetchall()[0][0]
    return (closed_tick([value for (value,) in landed]) or 0) if len(landed) == partitions else 0
