"""A dbt model's features: the rows of its spine, answered in chunks by the engine that `compute` runs.

Knows nothing of dbt. The spine is a query with the entity's keys (text), `request_ts` (t), `feature_watermark` (T), `known_at`
(K of block-fresh features) and `known_position` (list<bigint>, next offset per log partition; NULL: what landed before t); its
other columns are carried along. Keys may be NULL: such a row has empty windows.
"""

from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from warehouse.features.compute_plan import Plan, plan
from warehouse.features.compute_source import Relations
from warehouse.features.compute_spill import answers
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
    scratch: Path,
    rows: int = CHUNK_ROWS,
) -> Iterator[pa.Table]:
    """The carried columns and one column per feature, ordered by a column, `rows` rows at a time; at least one table.

    connection: knows the group's relations, at the snapshots that are meant. The spine is kept in a temporary table of
    its database, which spills to disk; of the answers one chunk is in memory. scratch: a folder for files of the time being.
    """
    what = plan({group.name: group}, group.entity_keys, _as_in_sql(group))
    asked = {*group.entity_keys, REQUEST_TS, WATERMARK, KNOWN_AT, KNOWN_POSITION}
    with connection.cursor() as spine, connection.cursor() as engine:
        for cursor in (spine, engine):
            cursor.execute("set TimeZone = 'UTC'")
        spine.execute(f"create or replace temp table {_SPINE} as select * from (\n{sql}\n) as spine order by {order_by}")
        edges = f"min({WATERMARK}), max({REQUEST_TS}), max({KNOWN_AT})"
        span = Span(*_instants(spine.execute(f"select {edges} from {_SPINE}").to_arrow_table()))
        num_rows = spine.execute(f"select count(*) from {_SPINE}").fetchall()[0][0]

        def chunks() -> Iterator[pa.Table]:
            for first in range(0, num_rows, rows):
                yield spine.execute(f"from {_SPINE} where rowid >= {first} and rowid < {first + rows}").to_arrow_table()

        def reads() -> Iterator[Reads]:
            return (_reads(chunk, group) for chunk in chunks())

        def with_carried(chunk: pa.Table, columns: dict[str, pa.Array]) -> pa.Table:
            return pa.table({name: chunk[name] for name in chunk.column_names if name not in asked} | columns)

        try:
            found = answers(engine, {group.name: relations}, what, span, reads, scratch)
            for chunk, columns in zip(chunks(), found, strict=True):
                yield with_carried(chunk, columns)
            if num_rows == 0:
                yield with_carried(spine.execute(f"from {_SPINE}").to_arrow_table(), _no_answers(what))
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
        {key: column(key, pa.string()) for key in group.entity_keys},
        instants(REQUEST_TS),
        instants(WATERMARK),
        instants(KNOWN_AT),
        column(KNOWN_POSITION, pa.list_(pa.int64())),
    )


def _no_answers(what: Plan) -> dict[str, pa.Array]:
    return {name: pa.array([], of) for name, of in what.types().items()}
