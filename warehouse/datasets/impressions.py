"""Turns a log of impressions (one row: a note shown, and what the reader then did) into events in order of arrival.

Shared by every adapter whose source is such a log. Letters: I rows of the log, U distinct impressions (a repeated row is one
impression that arrived again), E events.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from warehouse.datasets.base import DATASET_EVENTS_SCHEMA
from warehouse.datasets.delivery import delivery_delays_us
from warehouse.events import TIMESTAMP
from warehouse.time_algebra import FIVE_MINUTES_US, MINUTE_US, SECOND_US, floor_5m

REACTIONS = ("like", "comment", "share", "follow", "hide")
FLAGS = ("click", "long_view", *REACTIONS)

IMPRESSIONS_SCHEMA = pa.schema(
    [
        pa.field("impression_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("author_id", pa.string()),
        pa.field("surface", pa.string()),
        pa.field("request_id", pa.string()),
        pa.field("view_us", pa.int64(), nullable=False),
        pa.field("play_ms", pa.int64(), nullable=False),
        *(pa.field(flag, pa.bool_(), nullable=False) for flag in FLAGS),
    ]
)

LONGEST_PLAY_US = 10 * MINUTE_US
"""A play that reports more (a loop left running) is taken to have ended then; `watch_ms` keeps what was reported."""


def events_from_impressions(impressions: pa.Table, seed: int) -> pa.Table:
    """IMPRESSIONS_SCHEMA [I] → DATASET_EVENTS_SCHEMA [E], sorted by `landed_at`; the same seed gives the same table.

    One `view` per row, one event per flag that is set, one `watch` where play_ms > 0. A repeated impression_id keeps the first
    row's delays between view and action, so a repeated event is the same event arriving again (with another payload where the
    source had one). Everything has landed by `history_end_us`: what was still under way then is declared to land at that
    instant, so the history precedes every tick that is served after it.
    """
    rng = np.random.default_rng([seed, 0x1A9D])
    view_us = impressions["view_us"].to_numpy()
    if len(view_us) == 0:
        return DATASET_EVENTS_SCHEMA.empty_table()
    play_us = np.minimum(impressions["play_ms"].to_numpy() * 1000, LONGEST_PLAY_US)
    happened_us = {"view": view_us, "watch": view_us + play_us, "long_view": view_us + play_us}
    distinct_I = impressions["impression_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    num_distinct = int(distinct_I.max()) + 1
    click_delay_U = rng.lognormal(np.log(1.2), 0.6, num_distinct).clip(0.2, 20)
    happened_us["click"] = view_us + (click_delay_U[distinct_I] * SECOND_US).astype(np.int64)
    for reaction in REACTIONS:
        share_of_play_U, thinking_U = rng.random(num_distinct), rng.lognormal(np.log(1.5), 0.7, num_distinct).clip(0.2, 60)
        during_play = (share_of_play_U[distinct_I] * play_us).astype(np.int64)
        happened_us[reaction] = view_us + during_play + (thinking_U[distinct_I] * SECOND_US).astype(np.int64)

    # `view` first: among events that land in the same microsecond an impression precedes what was done with it
    end_us = history_end_us(int(view_us.max()))
    parts = []
    for event_type in ("view", *FLAGS, "watch"):
        chosen = _rows_of(event_type, impressions)
        parts.append(_events_of_type(event_type, impressions.take(chosen), happened_us[event_type][chosen], end_us))
    events = pa.concat_tables(parts)
    event_us = events["event_ts"].cast(pa.int64()).to_numpy()
    landed_us = np.minimum(event_us + delivery_delays_us(rng, len(events)), end_us)
    order = np.argsort(landed_us, kind="stable")
    landed_at = pa.array(landed_us, TIMESTAMP)
    return _in_schema(events.append_column("landed_at", landed_at).take(order).combine_chunks(), DATASET_EVENTS_SCHEMA)


def history_end_us(last_view_us: int) -> int:
    """The instant by which everything has landed: the second 5-minute boundary after the last view."""
    return floor_5m(last_view_us) + 2 * FIVE_MINUTES_US


def _rows_of(event_type: str, impressions: pa.Table) -> np.ndarray:
    if event_type == "view":
        return np.arange(len(impressions))
    if event_type == "watch":
        return np.flatnonzero(impressions["play_ms"].to_numpy() > 0)
    return np.flatnonzero(impressions[event_type].to_numpy())


def _events_of_type(event_type: str, impressions: pa.Table, happened_us: np.ndarray, end_us: int) -> pa.Table:
    num_events = len(impressions)
    properties = pa.nulls(num_events, pa.string())
    if event_type == "watch":
        watch_ms = impressions["play_ms"].cast(pa.string())
        properties = pc.binary_join_element_wise('{"watch_ms": ', watch_ms, "}", "")
    columns = {
        "event_id": pc.binary_join_element_wise(event_type, impressions["impression_id"], ":"),
        "event_type": pa.repeat(pa.scalar(event_type), num_events),
        **{name: impressions[name] for name in ("user_id", "note_id", "author_id", "surface", "request_id", "impression_id")},
        "event_ts": pa.array(np.minimum(happened_us, end_us - SECOND_US), TIMESTAMP),
        "retracts": pa.nulls(num_events, pa.string()),
        "properties": properties,
    }
    return pa.table(columns)


def _in_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    return table.select(schema.names).cast(schema)
