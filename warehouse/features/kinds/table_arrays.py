"""Features of batch tables for reads of a spine, on arrays: what `compute` runs where the table's rows fit in memory."""

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from warehouse.features.compute_arrays import KeyCodes
from warehouse.features.compute_event_arrays import EventOrder
from warehouse.features.compute_plan import TABLE_TYPES
from warehouse.features.compute_spine import Reads
from warehouse.features.kinds.declared import TableFeatures
from warehouse.features.render import render_macro
from warehouse.time_algebra import FIVE_MINUTES_US, GRACE_US


class TableArrays:
    """The table's rows in memory, by key and time. The connection knows the table by the name of its relation."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, table: TableFeatures, last_request_us: int):
        self._table = table
        rows = connection.execute(_rows_sql(table, last_request_us)).to_arrow_table()
        event_us = rows["event_us"].to_numpy()
        available_us = rows["available_us"].to_numpy() if _says_when(table) else event_us
        ties = [rows["available_us"]] if _says_when(table) else []
        ties += [rows[f"tie_{number}"] for number in range(len(table.order))]
        self._codes = KeyCodes([rows[key] for key in table.keys])
        self._order = EventOrder(self._codes.codes, event_us, _known_us(event_us, available_us), ties)
        self._values = {value.name: rows[value.name].combine_chunks() for _, value in table.columns}

    def columns(self, reads: Reads) -> dict[str, pa.Array]:
        """The table's features for each read, in order."""
        codes = self._codes.look_up([reads.keys[key] for key in self._table.keys])
        row_N = self._order.newest(codes, reads.request_us, reads.known_us + 1)
        is_there = row_N >= 0
        places = pa.array(row_N, mask=~is_there)
        found = {}
        for _, value in self._table.columns:
            of = TABLE_TYPES[value.type]
            values = self._values[value.name].take(places).cast(of)
            if value.empty is not None and not is_there.all():
                values = pc.if_else(pa.array(is_there), values, pa.scalar(value.empty, of))
            found[value.name] = values
        return found


def _says_when(table: TableFeatures) -> bool:
    """Whether the table has a time of its own for when a row could first be read."""
    return table.available_at != table.event_time


def _known_us(event_us: np.ndarray, available_us: np.ndarray) -> np.ndarray:
    """The tick from which each row is known: `warehouse.time_algebra.known_at` of arrays."""
    last = event_us if available_us is event_us else np.maximum(event_us, available_us - GRACE_US)
    return (last // FIVE_MINUTES_US + 1) * FIVE_MINUTES_US


def _rows_sql(table: TableFeatures, before_us: int) -> str:
    """`select` of the rows before an instant: keys, times in microseconds, values, and what decides between alike times."""
    items = [f'cast("{key}" as varchar) as "{key}"' for key in table.keys]
    items.append(f'epoch_us("{table.event_time}") as event_us')
    if _says_when(table):
        items.append(f"epoch_us({render_macro('table_available_at', table.as_meta())}) as available_us")
    items += [f'"{column}" as tie_{number}' for number, column in enumerate(table.order)]
    items += [f'cast("{column}" as {value.type}) as {value.name}' for column, value in table.columns]
    conditions = [f'"{table.event_time}" < make_timestamptz({before_us})', *(f'"{key}" is not null' for key in table.keys)]
    return f"select {', '.join(items)} from {table.relation} where {' and '.join(conditions)}"
