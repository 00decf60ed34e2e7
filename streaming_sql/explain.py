"""Why a feature has its value: the tick, the position, the very blocks and head events it was put together from."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from streaming_sql.block_layer import Blocks
from streaming_sql.group_state import GroupState, Instant
from streaming_sql.key_index import Key
from streaming_sql.plan import GroupPlan


@dataclass(frozen=True)
class Explanation:
    """One key of one group as a request at t_us reads it; instants in microseconds.

    known_at_us: K of block-fresh measures (the tick). position: K of event-fresh ones. blocks: by block_start, each with the
    latest arrival tick combined into it and its numbers. A group with event-fresh measures shows the blocks that those read:
    less what a retraction took out that the position knows and the tick does not.
    """

    group: str
    key: Key
    t_us: int
    tick_us: int
    known_at_us: int
    position: tuple[int, ...]
    values: dict[str, float | None]
    sequences: dict[str, list[str]]
    blocks: list[dict[str, Any]]
    head: list[dict[str, Any]]


def explain_key(state: GroupState, key: Key, at: Instant) -> Explanation:
    """The explanation of one key. Blocks that no window of the group reaches are left out."""
    plan = state.plan
    matrix = state.assemble([key], at)
    numbers = {
        name: None if np.isnan(value) else value for name, value in zip(matrix.names, matrix.values[0].tolist(), strict=True)
    }
    oldest_us = min(at.bounds(family.name, plan.keep_us)[0] for family in plan.families)
    (row,) = state.index.find([key]).tolist()
    blocks = []
    for layer in state.layers_of("event" if plan.fresh else "tick") if row >= 0 else ():
        (run,) = layer.runs_of(np.array([row])).tolist()
        if run < 0:
            continue
        rows = layer.blocks(plan)
        first, end = layer.run_offsets.numpy()[run : run + 2].tolist()
        for b in range(first, end):
            if oldest_us <= rows.block_start[b] < at.tick_us:
                blocks.append(_block(plan, rows, b))
    head = [
        {
            "event_id": event.event_id,
            "event_ts": event.event_ts,
            "known_at": event.known_at,
            "log_partition": event.log_partition,
            "log_offset": event.log_offset,
            **{measure.name: value for measure, value in zip(plan.fresh, event.values, strict=True) if value is not None},
        }
        for event in state.head.visible(tuple(key), at.position, at.t_us)
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
        sorted(blocks, key=lambda block: (block["block_start"], block["known_at"])),
        sorted(head, key=lambda event: (event["event_ts"], event["event_id"])),
    )


def _block(plan: GroupPlan, rows: Blocks, b: int) -> dict[str, Any]:
    block: dict[str, Any] = {"block_start": int(rows.block_start[b]), "known_at": int(rows.known_at[b])}
    for family in plan.families:
        for place, column in enumerate(family.sum_columns):
            block[column] = int(rows.sums[family.name][b, place])
    for column in plan.covers:
        value = float(rows.covers[column][b])
        block[column] = None if np.isnan(value) else value
    return block
