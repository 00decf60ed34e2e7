"""Features of batch tables for reads of a spine, by the SQL that dbt runs."""

from collections.abc import Sequence

import duckdb
import pyarrow as pa

from warehouse.errors import HeadraceError
from warehouse.events import TIMESTAMP
from warehouse.features.compute_plan import TABLE_TYPES
from warehouse.features.compute_spine import REQUEST_TS, Reads
from warehouse.features.kinds.declared import TableFeatures
from warehouse.features.render import render_macro
from warehouse.lake import Lake, duckdb_connection


def open_tables(lake: Lake, connection: duckdb.DuckDBPyConnection, tables: Sequence[TableFeatures]) -> None:
    """Makes the tables' rows ready in a connection, once for every chunk of a spine. Raises HeadraceError for a table that is
    not there or whose times have no zone."""
    for table in tables:
        if not lake.exists(table.relation):
            raise HeadraceError(f"{table.source}: the lake has no table {table.relation}; land or build it first")
        schema = lake.table(table.relation).schema().as_arrow()
        needed = (*table.keys, table.event_time, table.available_at, *table.order)
        for column in dict.fromkeys(needed):
            if column not in schema.names:
                raise HeadraceError(
                    f"{table.source}: {table.relation} has no column {column}; it has {', '.join(schema.names)}"
                )
        for column in (table.event_time, table.available_at):
            of = schema.field(column).type
            if not pa.types.is_timestamp(of) or of.tz is None:
                raise HeadraceError(f"{table.source}: {table.relation}.{column} is {of}; it must be a timestamp with a zone")
        lake.create_view(connection, table.relation)
        placed, last_known = prepared(table)
        rows = render_macro("placed_table_rows", table.as_meta(), table.relation)
        connection.execute(f"create temp table {placed} as {rows}")
        connection.execute(f"create temp table {last_known} as {render_macro('last_known_rows', table.as_meta(), placed)}")


def table_columns(connection: duckdb.DuckDBPyConnection, table: TableFeatures, reads: Reads) -> dict[str, pa.Array]:
    """The table's features for each read, in order. The connection knows the table (`open_tables`)."""
    spine = pa.table(
        {
            "row_id": pa.array(range(len(reads)), pa.int64()),
            REQUEST_TS: pa.array(reads.request_us, pa.int64()).cast(TIMESTAMP),
            "known_at": pa.array(reads.known_us, pa.int64()).cast(TIMESTAMP),
            **{key: reads.keys[key] for key in table.keys},
        }
    )
    found = _at(connection, table, spine)
    return {value.name: pa.concat_arrays(found[value.name].cast(TABLE_TYPES[value.type]).chunks) for _, value in table.columns}


def recompute_table(lake: Lake, table: TableFeatures, spine: pa.Table) -> pa.Table:
    """The table's features at each row's own t and T (K = T), in the order of row_id. spine: as of `recompute`."""
    with duckdb_connection() as connection:
        open_tables(lake, connection, [table])
        return _at(connection, table, spine.append_column("known_at", spine["feature_watermark"]))


def prepared(table: TableFeatures) -> tuple[str, str]:
    """Names that a connection has, after `open_tables`, for the table's placed rows and for its last known ones."""
    return f'"placed rows of {table.name}"', f'"last known rows of {table.name}"'


def _at(connection: duckdb.DuckDBPyConnection, table: TableFeatures, spine: pa.Table) -> pa.Table:
    connection.register("table_spine", spine)
    try:
        sql = render_macro("table_features_at", table.as_meta(), "table_spine", table.relation, *prepared(table))
        return connection.execute(f"select * from ({sql}) order by row_id").to_arrow_table()
    finally:
        connection.unregister("table_spine")
