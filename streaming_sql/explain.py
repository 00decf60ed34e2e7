"""Why a feature has its value: the tick, the position, the very blocks and head events it was put together from."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from streaming_sql.block_layer import BlockLayer, Blocks
from streaming_sql.group_state import GroupState
from streaming_sql.key_index import Key
from streaming_sql.plan import GroupPlan
from streaming_sql.window_reader import Instant
from warehouse.features.measures import Measure
from warehouse.time_algebra import FIVE_MINUTES_US


@dataclass(frozen=True)
class Explanation:
    """One key of one group as a request at t_us reads it; instants in microseconds.

    known_at_us: K of block-fresh measures (the tick). position: K of event-fresh ones. blocks: by block_start, each with the
    latest arrival tick combined into it and what it stores: numbers, lists as (event_ts, event_id, value), maps by entry. A
    group with event-fresh measures shows the blocks that those read: less what a retraction took out that the position knows
    and the tick does not.
    """

    group: str
    key: Key
    t_us: int
    tick_us: int
    known_at_us: int
    position: tuple[int, ...]
    values: dict[str, float | None]
    sequences: dict[str, list[str]]
    maps: dict[str, dict[str, float]]
    blocks: list[dict[str, Any]]
    head: list[dict[str, Any]]


def explain_key(state: GroupState, key: Key, at: Instant) -> Explanation:
    """The explanation of one key. Blocks that no window of the group reaches are left out."""
    plan = state.plan
    matrix = state.assemble([key], at)
    numbers = {
        name: None if np.isnan(value) else value for name, value in zip(matrix.names, matrix.values[0].tolist(), strict=True)
    }
    oldest_us = min(at.tick_us, *(at.anchor(family.name) - plan.keep_us for family in plan.families))
    (block_key,) = state.block_keys([key], at.t_us)
    (row,) = state.index.find([block_key]).tolist()
    blocks = []
    for layer in state.layers_of("event" if plan.fresh else "tick") if row >= 0 else ():
        (run,) = layer.runs_of(np.array([row])).tolist()
        if run < 0:
            continue
        rows = layer.blocks(plan)
        first, end = layer.run_offsets[run : run + 2].tolist()
        for b in range(first, end):
            if oldest_us <= rows.block_start[b] < at.tick_us:
                blocks.append({**_block(plan, rows, b), **_lists_and_maps(state, layer, row, int(rows.block_start[b]))})
    head = [
        {
            "event_id": event.event_id,
            "event_ts": event.event_ts,
            "known_at": event.known_at,
            "log_partition": event.log_partition,
            "log_offset": event.log_offset,
            **{
                measure.name: _told(state, measure, value)
                for measure, value in zip(plan.fresh, event.values, strict=True)
                if value is not None
            },
        }
        for event in state.head.visible(block_key, at.position, at.t_us)
    ]
    return Explanation(
        plan.group.name,
        tuple(key),
        at.t_us,
        at.tick_us,
        at.tick_us,
        at.position,
        numbers,
        {name: lists[0] for name, lists in matrix.sequences.items()},
        {name: maps[0] for name, maps in matrix.maps.items()},
        sorted(blocks, key=lambda block: (block["block_start"], block["known_at"])),
        sorted(head, key=lambda event: (event["event_ts"], event["event_id"])),
    )


def _told(state: GroupState, measure: Measure, value: Any) -> Any:
    """A head event's value as it is said: a map entry is {entry: number}."""
    if measure.representation != "map":
        return value
    entry, values = value
    return {_entry(state, measure.name, entry): values[0] if len(values) == 1 else list(values)}


def _entry(state: GroupState, name: str, entry: int) -> str:
    return state.codes.texts([entry])[0] if state.plan.maps[name].has_texts else str(entry)


def _lists_and_maps(state: GroupState, layer: BlockLayer, row: int, block_start_us: int) -> dict[str, Any]:
    """The lists and maps of one block."""
    told: dict[str, Any] = {}
    rows, end_us = np.array([row]), block_start_us + FIVE_MINUTES_US
    for measure in state.plan.lists:
        _, *columns = layer.lists[measure.name].found(measure, rows, block_start_us, end_us)
        told[measure.name] = list(zip(*columns, strict=True))
    for name, maps in layer.maps.items():
        found = maps.found(rows, block_start_us, end_us)
        for column, values in zip(state.plan.maps[name].columns, found.values, strict=True):
            texts = [_entry(state, name, entry) for entry in found.entry.tolist()]
            told[column] = dict(zip(texts, values.tolist(), strict=True))
    return told


def _block(plan: GroupPlan, rows: Blocks, b: int) -> dict[str, Any]:
    block: dict[str, Any] = {"block_start": int(rows.block_start[b]), "known_at": int(rows.known_at[b])}
    for family in plan.families:
        for place, column in enumerate(family.sum_columns):
            block[column] = int(rows.sums[family.name][b, place])
    for column in plan.covers:
        value = float(rows.covers[column][b])
        block[column] = None if np.isnan(value) else value
    for measure in plan.moments:
        block |= zip(measure.columns, rows.moments[measure.name][b].tolist(), strict=True)
    return block
