"""Why a note is where it is: one request's forward-log row, read back from memory or from the lake."""

import threading
from collections import OrderedDict
from typing import Any

import pyarrow as pa
from pyiceberg.expressions import EqualTo

from serving.forward_log import FORWARD_LOG
from serving.served import Served
from warehouse.lake import Lake


class Recent:
    """The newest requests, so that an explanation need not wait for the lake. Bounded."""

    def __init__(self, size: int):
        self._size, self._lock = size, threading.Lock()
        self._served: OrderedDict[str, Served] = OrderedDict()

    def add(self, served: Served) -> None:
        with self._lock:
            self._served[served.request_id] = served
            while len(self._served) > self._size:
                self._served.popitem(last=False)

    def get(self, request_id: str) -> Served | None:
        with self._lock:
            return self._served.get(request_id)

    def row(self, request_id: str) -> dict[str, Any] | None:
        """The request's forward-log row (dicts for maps, microseconds for instants), or None if it is not among them."""
        served = self.get(request_id)
        return None if served is None else served.as_row()


def row_in_lake(lake: Lake, request_id: str) -> dict[str, Any] | None:
    """As `Recent.row`, of any request that was written."""
    if not lake.exists(FORWARD_LOG):
        return None
    rows = lake.scan(FORWARD_LOG, EqualTo("request_id", request_id))
    return _from_lake(rows) if rows.num_rows else None


def _from_lake(rows: pa.Table) -> dict[str, Any]:
    for name in ("request_ts", "feature_watermark"):
        rows = rows.set_column(rows.schema.get_field_index(name), name, rows[name].cast(pa.int64()))
    row = rows.slice(0, 1).to_pylist(maps_as_pydicts="strict")[0]
    row["candidates"] = row["candidates"] or []
    return row


def stage_reached(candidate: dict[str, Any]) -> str:
    """`shown`, or the last stage that scored a candidate: `l1`; `l2` for one below the page or its author's cap."""
    if candidate["shown"]:
        return "shown"
    return "l1" if candidate["final_score"] is None else "l2"
