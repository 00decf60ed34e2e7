"""A layer of blocks as a file of arrays, and back: mapped, not read."""

from collections.abc import Mapping

import numpy as np

from streaming_sql.array_file import text_arrays, texts_of
from streaming_sql.block_layer import BlockLayer
from streaming_sql.entry_maps import EntryMaps
from streaming_sql.event_lists import EventLists
from streaming_sql.plan import GroupPlan


def arrays_of(layer: BlockLayer) -> dict[str, np.ndarray]:
    """Everything a layer holds, by name."""
    arrays = {
        "rows": layer.rows,
        "run_offsets": layer.run_offsets,
        "block_start": layer.block_start,
        "known_at": layer.known_at,
        "place": layer.place,
    }
    arrays |= {f"prefix/{family}": sums for family, sums in layer.prefix.items()}
    arrays |= {f"covers/{column}": values for column, values in layer.covers.items()}
    arrays |= {f"moments/{measure}": values for measure, values in layer.moments.items()}
    for measure, lists in layer.lists.items():
        at = f"lists/{measure}"
        arrays |= {f"{at}/place": lists.place, f"{at}/row": lists.row, f"{at}/event_ts": lists.event_ts}
        arrays |= text_arrays(f"{at}/event_id", lists.event_id) | text_arrays(f"{at}/value", lists.value)
    for measure, maps in layer.maps.items():
        at = f"maps/{measure}"
        arrays |= {f"{at}/place": maps.place, f"{at}/entry": maps.entry}
        arrays |= {f"{at}/values/{number}": values for number, values in enumerate(maps.values)}
    return arrays


def layer_of(plan: GroupPlan, arrays: Mapping[str, np.ndarray]) -> BlockLayer:
    """The layer of `arrays_of`. Raises KeyError if the plan needs what is not there."""
    lists = {
        measure.name: EventLists(
            arrays[f"lists/{measure.name}/place"],
            arrays[f"lists/{measure.name}/row"],
            arrays[f"lists/{measure.name}/event_ts"],
            texts_of(f"lists/{measure.name}/event_id", arrays),
            texts_of(f"lists/{measure.name}/value", arrays),
        )
        for measure in plan.lists
    }
    maps = {
        name: EntryMaps(
            arrays[f"maps/{name}/place"],
            arrays[f"maps/{name}/entry"],
            tuple(arrays[f"maps/{name}/values/{number}"] for number in range(len(shape.columns))),
        )
        for name, shape in plan.maps.items()
    }
    return BlockLayer(
        arrays["rows"],
        arrays["run_offsets"],
        arrays["block_start"],
        arrays["known_at"],
        arrays["place"],
        {family.name: arrays[f"prefix/{family.name}"] for family in plan.families if family.sum_columns},
        {column: arrays[f"covers/{column}"] for column in plan.covers},
        {measure.name: arrays[f"moments/{measure.name}"] for measure in plan.moments},
        lists,
        maps,
    )
