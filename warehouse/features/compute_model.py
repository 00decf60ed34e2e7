"""A dbt model's features: the rows of its spine, answered in chunks by the engine that `compute` runs.

Knows nothing of dbt. The spine is a query with the group's keys (text), `request_ts` (t), `feature_watermark` (T), `known_at`
(K of block-fresh features) and `known_position` (list<bigint>, next offset per log partition; NULL: what landed before t); its
other columns are carried along. Keys may be NULL: such a row has empty windows.
"""

from collections.abc import Iterator

import duckdb
import numpy as np
import pyarrow as pa

from warehouse.features.compute_engine import Engine, Relations
from warehouse.features.compute_plan import Plan, plan
from warehouse.features.compute_spine import CHUNK_ROWS, REQUEST_TS, Reads, Span
from warehouse.features.declarations import FeatureGroup

WATERMARK, KNOWN_AT, KNOWN_POSITION = "feature_watermark", "known_at", "known_position"
_SPINE = "model_spine"


def model_chunks(
    connection: duckdb.DuckDBPyConnection,
    sql: str,
    group: FeatureGroup,
    relations: Relations,
    order_by: str,
    rows: int = CHUNK_ROWS,
) -> Iterator[pa.Table]:
    """The carried columns and one column per feature, ordered by a column, `rows` rows at a time; at least one table.

    connection: knows the group's relations, at the snapshots that are meant. The spine is kept in a temporary table of
    its database, which spills to disk; of the answers one chunk is in memory.
    """
    what = plan({group.name: group}, group.keys, _as_in_sql(group))
    asked = {*group.keys, REQUEST_TS, WATERMARK, KNOWN_AT, KNOWN_POSITION}
    with connection.cursor() as spine, connection.cursor() as engine_connection:
        for cursor in (spine, engine_connection):
            cursor.execute("set TimeZone = 'UTC'")
        spine.execute(f"create or replace temp table {_SPINE} as select * from (\n{sql}\n) as spine order by {order_by}")
        try:
            edges = f"min({WATERMARK}), max({REQUEST_TS}), max({KNOWN_AT})"
            span = Span(*_instants(spine.execute(f"select {edges} from {_SPINE}").to_arrow_table()))
            engine = None
            for batch in spine.execute(f"from {_SPINE}").to_arrow_reader(rows):
                chunk = pa.Table.from_batches([batch])
                carried = chunk.select([name for name in chunk.column_names if name not in asked])
                engine = engine or Engine(engine_connection, {group.name: relations}, what, span)
                yield _with(carried, engine.columns(_reads(chunk, group)))
            if engine is None:
                given = spine.execute(f"from {_SPINE}").to_arrow_table()
                yield _with(given.select([name for name in given.column_names if name not in asked]), _no_answers(what))
        finally:
            spine.execute(f"drop table {_SPINE}")


def _as_in_sql(group: FeatureGroup) -> tuple[str, ...]:
    """Names of features in the order in which `point_in_time` gives them."""
    windowed = [f"{measure.name}_{window.name}" for measure in group.measures for window in measure.windows]
    return tuple(f"{group.entity}_{name}" for name in (*windowed, *(derived.name for derived in group.derived)))


def _instants(row: pa.Table) -> list[int]:
    """The one row's instants, in microseconds; 0 for NULL."""
    return [column.cast(pa.int64()).to_pylist()[0] or 0 for column in row.columns]


def _reads(chunk: pa.Table, group: FeatureGroup) -> Reads:
    def instants(name: str) -> np.ndarray:
        return chunk[name].cast(pa.int64()).to_numpy()

    def column(name: str, of: pa.DataType) -> pa.Array:
        return chunk[name].cast(of).combine_chunks()

    return Reads(
        {key: column(key, pa.string()) for key in group.keys},
        instants(REQUEST_TS),
        instants(WATERMARK),
        instants(KNOWN_AT),
        column(KNOWN_POSITION, pa.list_(pa.int64())),
    )


def _no_answers(what: Plan) -> dict[str, pa.Array]:
    return {name: pa.array([], of) for name, of in what.types().items()}


def _with(carried: pa.Table, answers: dict[str, pa.Array]) -> pa.Table:
    return pa.table({**dict(zip(carried.column_names, carried.columns, strict=True)), **answers})
