"""Recomputes features from the lake for any spine, at each row's own t, T and K: what was served, or what would have been."""

import pyarrow as pa

from warehouse.errors import HeadraceError
from warehouse.features.declarations import FeatureGroup
from warehouse.features.render import point_in_time_sql
from warehouse.lake import Lake

STAGING = "staging"


def recompute(lake: Lake, group: FeatureGroup, spine: pa.Table) -> pa.Table:
    """The group's features for each row of the spine, in the spine's order.

    spine: `row_id` (unique), the entity's keys (string), `request_ts`, `feature_watermark` (timestamptz), `known_position`
    (list<bigint>: next offset per log partition; null: landed before t) and optionally `known_at` (timestamptz, K of
    block-fresh features; T where missing). Blocks must be built past the largest T. Raises HeadraceError if they are not.
    """
    missing = {"row_id", *group.entity_keys, "request_ts", "feature_watermark", "known_position"} - set(spine.column_names)
    if missing:
        raise HeadraceError(
            f"the spine for {group.name} lacks {', '.join(sorted(missing))}; it has {', '.join(spine.column_names)}"
        )
    tables = {
        "blocks": f"features.{group.name}",
        "hours": f"features.{group.name}_1h",
        "days": f"features.{group.name}_1d",
        "events": f"{STAGING}.{group.events}",
        "shadowed": f"{STAGING}.stg_shadowed_arrivals",
        "retractions": f"{STAGING}.stg_retractions",
    }
    for name in tables.values():
        if not lake.exists(name):
            raise HeadraceError(f"the lake has no {name} yet; run `dbt build` first")
    with lake.duckdb() as connection:
        connection.register("given", spine)
        known_at = "known_at" if "known_at" in spine.column_names else "feature_watermark"
        connection.execute(
            f"""
            create temp table spine as
            select
                row_id, {", ".join(group.entity_keys)}, request_ts, feature_watermark,
                {known_at} as known_at, cast(known_position as bigint[]) as known_position
            from given
            """
        )
        return connection.execute(
            f"select * from ({point_in_time_sql(group, 'spine', **tables)}) as answers order by row_id"
        ).to_arrow_table()
