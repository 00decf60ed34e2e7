"""The other kinds of features as `headrace features list` and `show` print them."""

from typing import Any

from warehouse.features.kinds.declared import Kinds
from warehouse.features.kinds.values import Typed

LOGGED = "logged when served, in lake.forward_log; NULL in training rows without a log, never recomputed"


def kind_rows(kinds: Kinds) -> list[dict[str, Any]]:
    """One row per feature, with the keys that every row of `features list` has."""
    rows = [
        _row(one.value, "request", [], one.source)
        | {"context_key": one.context_key, "inputs": list(one.value.inputs), "known": LOGGED}
        for one in kinds.request
    ]
    rows += [
        _row(one.value, "http", [], one.source)
        | {"url": one.url, "path": one.path, "timeout_ms": one.timeout_ms, "inputs": list(one.inputs), "known": LOGGED}
        for one in kinds.http
    ]
    for table in kinds.tables:
        rows += [
            _row(value, "table", list(table.keys), table.source)
            | {
                "lineage": f"{table.relation}.{column} -> last row: {table.event_time} < t, {table.available_at} known at K",
                "order": [table.event_time, table.available_at, *table.order],
            }
            for column, value in table.columns
        ]
    return rows


def _row(value: Typed, kind: str, keys: list[str], source: str) -> dict[str, Any]:
    shown = {"type": value.type, "empty": value.empty, "description": value.description, "declared_in": source}
    allowed = {"allowed": list(value.allowed)} if value.allowed else {}
    freshness = "block" if kind == "table" else "request"
    return {
        "feature": value.name,
        "aggregation": kind,
        "window": None,
        "freshness": freshness,
        "keys": keys,
        **shown,
        **allowed,
    }
