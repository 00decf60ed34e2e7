"""Features of batch tables for reads of a spine: on arrays where the rows fit in memory, else by the SQL that dbt runs."""

from collections.abc import Sequence

import duckdb
import numpy as np
import pyarrow as pa

from warehouse.connections import duckdb_connection
from warehouse.errors import HeadraceError
from warehouse.events import TIMESTAMP
from warehouse.features.compute_plan import TABLE_TYPES
from warehouse.features.compute_spine import REQUEST_TS, Reads, Span
from warehouse.features.kinds.declared import TableFeatures
from warehouse.features.kinds.table_arrays import TableArrays
from warehouse.features.render import render_macro
from warehouse.lake import Lake

ROWS_IN_ARRAYS = 30_000_000
"""A table with more goes through DuckDB, which spills to disk; slower."""


class TableReader:
    """Answers chunks of reads for one table that passed `check_table`, over a connection that has a view of its relation."""

    def __init__(self, lake: Lake, connection: duckdb.DuckDBPyConnection, table: TableFeatures, span: Span):
        self._connection, self._table = connection, table
        self._arrays: TableArrays | None = None
        if num_rows(lake, table) <= ROWS_IN_ARRAYS:
            self._arrays = TableArrays(connection, table, span.last_request_us)
        else:
            prepare_table(connection, table)

    def columns(self, reads: Reads) -> dict[str, pa.Array]:
        """The table's features for each read, in order."""
        return self._arrays.columns(reads) if self._arrays else table_columns(self._connection, self._table, reads)


def check_table(lake: Lake, table: TableFeatures) -> None:
    """Raises HeadraceError for a table that is not there, lacks a column or whose times have no zone."""
    if not lake.exists(table.relation):
        raise HeadraceError(f"{table.source}: the lake has no table {table.relation}; land or build it first")
    schema = lake.table(table.relation).schema().as_arrow()
    needed = (*table.keys, table.event_time, table.available_at, *table.order)
    for column in dict.fromkeys(needed):
        if column not in schema.names:
            raise HeadraceError(f"{table.source}: {table.relation} has no column {column}; it has {', '.join(schema.names)}")
    for column in (table.event_time, table.available_at):
        of = schema.field(column).type
        if not pa.types.is_timestamp(of) or of.tz is None:
            raise HeadraceError(f"{table.source}: {table.relation}.{column} is {of}; it must be a timestamp with a zone")


def num_rows(lake: Lake, table: TableFeatures) -> int:
    return int(lake.properties(table.relation).get("total-records", 0))


def open_tables(lake: Lake, connection: duckdb.DuckDBPyConnection, tables: Sequence[TableFeatures]) -> None:
    """Makes the tables' rows ready in a connection, once for every chunk of a spine. Raises HeadraceError as `check_table`."""
    for table in tables:
        check_table(lake, table)
        lake.create_view(connection, table.relation)
        prepare_table(connection, table)


def prepare_table(connection: duckdb.DuckDBPyConnection, table: TableFeatures) -> None:
    """Puts the table's placed rows and its last known ones into the connection, under the names of `prepared`."""
    placed, last_known = prepared(table)
    rows = render_macro("placed_table_rows", table.as_meta(), table.relation)
    connection.execute(f"create temp table {placed} as {rows}")
    connection.execute(f"create temp table {last_known} as {render_macro('last_known_rows', table.as_meta(), placed)}")


def table_columns(connection: duckdb.DuckDBPyConnection, table: TableFeatures, reads: Reads) -> dict[str, pa.Array]:
    """The table's features for each read, in order, by SQL. The connection knows the table (`prepare_table`)."""
    spine = pa.table(
        {
            "row_id": np.arange(len(reads)),
            REQUEST_TS: pa.array(reads.request_us).cast(TIMESTAMP),
            "known_at": pa.array(reads.known_us).cast(TIMESTAMP),
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
