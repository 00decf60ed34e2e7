"""Event logs and questions made from declarations: what `headrace features verify` puts through every execution.

The events are late, early, duplicated (also with another payload, also after the duplicate memory), retracted (also before they
arrive, twice, and for nothing), tied, null, out of order, on boundaries and in two log partitions, one of which lags. Keys and
values come from the declared expressions, so that their conditions are met, missed and met by NULL.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from random import Random
from typing import Any

import pyarrow as pa
import sqlglot
from sqlglot import expressions as exp

from warehouse.events import EVENTS_SCHEMA, RETRACTION, TIMESTAMP
from warehouse.features.attributes import Attributes, names_of
from warehouse.features.declarations import FeatureGroup
from warehouse.features.oracle import Read
from warehouse.time_algebra import (
    DAY_US,
    DUPLICATE_MEMORY_US,
    FIVE_MINUTES_US,
    FURTHEST_AHEAD_US,
    GRACE_US,
    HOUR_US,
    MINUTE_US,
    SECOND_US,
    floor_5m,
    newest_tick,
)

START_US = 1_767_225_600_000_000
"""2026-01-01 00:00 UTC."""
SPREAD_US = 3 * DAY_US
EDGES_US = (0, 0, -1, 1, SECOND_US, 2 * MINUTE_US, FIVE_MINUTES_US - 1)
DELAYS_US = (0, 0, 1, SECOND_US, GRACE_US - 1, GRACE_US, GRACE_US + 1, 4 * MINUTE_US, 70 * MINUTE_US, 26 * HOUR_US, 6 * DAY_US)
AHEAD_US = (MINUTE_US, 8 * MINUTE_US, FURTHEST_AHEAD_US)
RETRACTED_AFTER_US = (0, SECOND_US, 2 * MINUTE_US, HOUR_US, 2 * DAY_US, 9 * DAY_US, -2 * MINUTE_US, -HOUR_US, -8 * DAY_US)
IDS = ("1", "12", "23", "3", "é", "a b", *(f"k{number}" for number in range(10)))
"""Ids that collide when composite keys are concatenated ((1, 23) and (12, 3)), and some that are not plain ASCII."""


def generated_events(random: Random, groups: Collection[FeatureGroup], number: int) -> list[dict[str, Any]]:
    """Rows of `lake.events` with times in microseconds, in order of landing, and the typed columns that expressions read."""
    filled = names_of(attributes_of(groups))
    pools = {column: pool for column, pool in _pools(groups).items() if column in EVENTS_SCHEMA.names or column not in filled}
    typed = [column for column in pools if column not in EVENTS_SCHEMA.names]
    lag_us = random.choice((0, 3 * MINUTE_US, HOUR_US))
    rows = []
    for at in range(number - number // 10):
        event_us = START_US + random.randrange(SPREAD_US // FIVE_MINUTES_US) * FIVE_MINUTES_US + random.choice(EDGES_US)
        delay_us = random.choice(DELAYS_US) if random.random() < 0.9 else -random.choice(AHEAD_US)
        partition = random.randrange(2)
        row: dict[str, Any] = dict.fromkeys(EVENTS_SCHEMA.names)
        row |= {column: random.choice(pool) for column, pool in pools.items()}
        properties = {column: row[column] for column in typed if row[column] is not None}
        row |= {
            "event_id": f"e{at if random.random() < 0.8 else random.randrange(number)}",
            "event_ts": event_us,
            "landed_at": max(event_us + delay_us + (lag_us if partition else 0), 0),
            "log_partition": partition,
            "landing": "log",
            "retracts": None,
            "properties": json.dumps(properties) if properties or random.random() < 0.5 else None,
        }
        rows.append(row)
    for row in random.sample(rows, number // 10):  # the same id again: just within the duplicate memory, and just after it
        ago_us = random.choice((SECOND_US, HOUR_US, DUPLICATE_MEMORY_US, DUPLICATE_MEMORY_US + 1))
        rows.append({**row, "event_ts": row["event_ts"] + ago_us - MINUTE_US, "landed_at": row["landed_at"] + ago_us})
    rows += _retractions(random, rows, number // 100)
    return in_log_order(rows)


def attributes_of(groups: Collection[FeatureGroup]) -> tuple[Attributes, ...]:
    """What tables add to the events of groups that read one staging model."""
    return next((group.attributes for group in groups), ())


def generated_tables(
    random: Random, groups: Collection[FeatureGroup], rows: Sequence[dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Of each table that adds to the events, versions of some keys: valid from and available on, just before and just after
    what events have, changed, corrected, late, tied, and NULL in every column."""
    pools = _pools(groups)
    tables: dict[str, list[dict[str, Any]]] = {}
    for entry in attributes_of(groups):
        for _ in range(max(len(rows) // 4, 8)):
            event = random.choice(rows)
            valid_from = event["event_ts"] + random.choice((0, 0, 1, -1, -SECOND_US, -HOUR_US, -2 * DAY_US))
            landed = event["landed_at"]
            available_at = random.choice(
                (valid_from, landed, floor_5m(landed - GRACE_US) + GRACE_US - random.choice((0, 1)), None)
            )
            row: dict[str, Any] = dict.fromkeys(
                name for one in attributes_of(groups) if one.relation == entry.relation for name in one.table_columns
            )
            row |= {one.column: _some(random, one.type, pools.get(one.name)) for one in entry.columns}
            own = random.random() < 0.7
            row |= {
                column: event[name] if own and event.get(name) is not None else random.choice((*pools.get(name, IDS), "nobody"))
                for name, column in entry.keys
            }
            row |= {entry.available_at: available_at, entry.valid_from: valid_from if random.random() < 0.97 else None}
            known = tables.setdefault(entry.relation, [])
            if known and random.random() < 0.3:  # another value of a version that there is, at the same time or later
                row = {**random.choice(known), **{one.column: row[one.column] for one in entry.columns}}
            known.append(row)
    return tables


def _some(random: Random, kind: str, pool: list[Any] | None) -> Any:
    fit: Any = {"varchar": str, "boolean": bool, "double": (int, float)}.get(kind, int)
    others = {"varchar": ("1", "é", "a b"), "boolean": (True, False), "double": (0.5, -1.0)}.get(kind, (0, 1, -3, 2**31 - 1))
    near = [value for value in pool or () if isinstance(value, fit) and (isinstance(value, str) or abs(value) < 2**31)]
    return random.choice((*near, *others, None))


def attribute_tables(attributes: Sequence[Attributes], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, pa.Table]:
    """The tables that add to events, by `namespace.table`, from rows with times in microseconds; what a row lacks is NULL."""
    types = {"bigint": pa.int64(), "integer": pa.int32(), "double": pa.float64(), "boolean": pa.bool_()}
    kinds: dict[str, dict[str, pa.DataType]] = {}
    for entry in attributes:
        columns = kinds.setdefault(entry.relation, {})
        columns |= {one.column: types.get(one.type, pa.string()) for one in entry.columns}
        columns |= dict.fromkeys((column for _, column in entry.keys), pa.string())
        columns |= dict.fromkeys((entry.valid_from, entry.available_at), TIMESTAMP)
    return {
        relation: pa.table(
            {name: pa.array([row.get(name) for row in rows.get(relation, ())], kind) for name, kind in columns.items()}
        )
        for relation, columns in kinds.items()
    }


def in_log_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in order of landing, each with its offset in its partition, 0 or 1, of the log."""
    rows.sort(key=lambda row: row["landed_at"])
    next_offset = [0, 0]
    for row in rows:
        row["log_offset"] = next_offset[row["log_partition"]]
        next_offset[row["log_partition"]] += 1
    return rows


def _retractions(random: Random, rows: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Events that take others back, of a few ids only, so that other keys stay untouched."""
    few = [row for row in rows if all(row[key] in IDS[:4] for key in ("user_id", "note_id", "author_id"))]
    found = []
    for at in range(number if few else 0):
        target = random.choice(few)
        landed_at = max(target["landed_at"] + random.choice(RETRACTED_AFTER_US), 0)
        found.append(
            {
                **target,
                "event_id": f"r{at if random.random() < 0.9 else random.randrange(number)}",
                "event_type": RETRACTION,
                "event_ts": landed_at - SECOND_US,
                "landed_at": landed_at,
                "log_partition": random.randrange(2),
                "retracts": target["event_id"] if random.random() < 0.95 else "nobody",
            }
        )
    return found


def _pools(groups: Collection[FeatureGroup]) -> dict[str, list[Any]]:
    """Values per column: ids for keys, what expressions compare a column with and its neighbours, others, and NULL."""
    keys = {key for group in groups for key in group.entity_keys} | {"user_id", "note_id", "author_id"}
    compared: dict[str, list[Any]] = {"event_type": [], **{key: list(IDS) for key in sorted(keys)}}
    for text in (text for group in groups for m in group.measures for text in (m.where, m.of, m.bucket_by) if text):
        for column in sqlglot.parse_one(text, dialect="duckdb").find_all(exp.Column):
            pool = compared.setdefault(column.name, [])
            pool += [value for literal in _compared_with(column) for value in _around(literal)]
    pools = {}
    for name, values_near in compared.items():
        if name == "event_type":  # never NULL
            others: list[Any] = ["other"]
        elif name in EVENTS_SCHEMA.names:
            others = ["other", "é", "Z", "a b", None]
        else:  # an integer out of `properties`
            others = [None, -3, 0, 1, 2, 5, 2**52]
        pools[name] = list(dict.fromkeys([*values_near, *others]))
    return pools


def _compared_with(column: exp.Column) -> list[exp.Literal]:
    """The literals of the comparison that a column stands in."""
    around = column.find_ancestor(exp.EQ, exp.NEQ, exp.LT, exp.LTE, exp.GT, exp.GTE, exp.In, exp.Between)
    return [] if around is None else list(around.find_all(exp.Literal))


def _around(literal: exp.Literal) -> list[Any]:
    if literal.is_string:
        return [literal.this]
    number = round(float(literal.this))
    return [number - 1, number, number + 1]


def asked(
    random: Random, group: FeatureGroup, rows: list[dict[str, Any]], lengths: Sequence[int], strangers: float
) -> tuple[tuple[str | None, ...], int]:
    """The key of some event, parts of it another's with the probability `strangers`, and a t on or beside its instant, its
    arrival, its block, or a window's length (`lengths`, microseconds) after one of them."""
    event = random.choice(rows)
    key = tuple(
        random.choice((*IDS, "nobody", None)) if random.random() < strangers else event[name] for name in group.entity_keys
    )
    aim = random.choice((event["event_ts"], event["landed_at"], floor_5m(event["event_ts"])))
    aim += random.choice((0, 0, *lengths)) + random.choice((0, 0, FIVE_MINUTES_US, 2 * FIVE_MINUTES_US))
    return key, aim + random.choice((-1, 0, 1, GRACE_US, GRACE_US - 1))


def generated_reads(random: Random, group: FeatureGroup, rows: list[dict[str, Any]], number: int) -> list[Read]:
    """Questions whose edges fall on and beside events; half of them as a spine asks, the rest at any T, K and position."""
    lengths = [window.length_us for measure in group.measures for window in measure.windows]
    reads = []
    for at in range(number):
        key, request_us = asked(random, group, rows, lengths, 0.1)
        tick_us = newest_tick(request_us)
        if at % 2:
            known_us = tick_us + random.choice((0, 0, -1, 1, 300, 3000)) * FIVE_MINUTES_US
            reads.append(Read(key, request_us, tick_us, known_us, None))
            continue
        tick_us -= random.choice((0, 0, 1, 12)) * FIVE_MINUTES_US
        known_us = tick_us + random.choice((0, 0, -1, 1, 300)) * FIVE_MINUTES_US
        reads.append(Read(key, request_us, tick_us, known_us, position(random, rows, tick_us, request_us)))
    return reads


def position(random: Random, rows: list[dict[str, Any]], tick_us: int, request_us: int) -> tuple[int, ...]:
    """A log position at or past the one that closed the tick; the partitions need not be equally far."""
    position = []
    for partition in (0, 1):
        landings = [row["landed_at"] for row in rows if row["log_partition"] == partition]
        must = sum(landed < tick_us + GRACE_US for landed in landings)
        position.append(random.randint(must, max(must, sum(landed < request_us + HOUR_US for landed in landings))))
    return tuple(position)


def as_table(rows: list[dict[str, Any]]) -> pa.Table:
    """The rows as an Arrow table in the schema of `lake.events`."""
    columns = {
        item.name: pa.array([row[item.name] for row in rows], pa.int64() if pa.types.is_timestamp(item.type) else item.type)
        for item in EVENTS_SCHEMA
    }
    return pa.table(columns).cast(EVENTS_SCHEMA)
