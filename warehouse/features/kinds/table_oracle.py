"""What a feature of a batch table is, written as plainly as possible: every execution of `kind: table` is judged by it."""

from collections.abc import Iterable, Mapping
from typing import Any

from warehouse.features.kinds.declared import TableFeatures
from warehouse.time_algebra import known_at


def table_values(
    table: TableFeatures, rows: Iterable[Mapping[str, Any]], key: tuple[str, ...], request_us: int, known_us: int
) -> dict[str, Any]:
    """Of the key's rows with event_time < t that are known at K, the values of the last one; the empty values if there is none.

    rows: the table's, times in microseconds. request_us: t. known_us: K, a tick.
    """
    known = []
    for row in rows:
        happened = row[table.event_time]
        if happened is None or tuple(row[column] for column in table.keys) != key:
            continue
        available = happened if row[table.available_at] is None else row[table.available_at]
        if happened < request_us and known_at(happened, available) <= known_us:
            decides = [row[column] for column in table.order]
            known.append(((happened, available, *((value is not None, value or 0) for value in decides)), row))
    if not known:
        return {value.name: value.empty for _, value in table.columns}
    last = max(known, key=lambda one: one[0])[1]
    return {value.name: last[column] for column, value in table.columns}
