"""The store that a process starts from: the newest tick it published before it ended, else the blocks in the lake.

Published blocks are taken only if they are undamaged, of these declarations, and of this very lake and log; anything else is
said in the process's log and made again from the lake, which takes longer and comes to the same.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streaming_sql.bulk_load import newest_built_tick
from streaming_sql.event_log import Log
from streaming_sql.online_store import OnlineStore
from streaming_sql.published import UNUSABLE, Published, Reading, newest_published
from warehouse.features.declarations import FeatureGroup
from warehouse.lake import Lake
from warehouse.landing import EVENTS

_LOG = logging.getLogger("headrace.stream")
STORE_FOLDER = "store"
"""Below `Home.online`."""


def origin_of(lake: Lake) -> dict[str, Any]:
    """What says that blocks were made from this lake's events: the table, and the imports that it holds."""
    if not lake.exists(EVENTS):
        return {"table": None, "imports": []}
    table = lake.table(EVENTS)
    imports = sorted(name for name in table.properties if name.startswith("headrace.landed."))
    return {"table": str(table.metadata.table_uuid), "imports": imports}


def open_store(folder: Path, lake: Lake, log: Log, groups: Mapping[str, FeatureGroup]) -> OnlineStore:
    """A store whose blocks are those of a tick; `Runner.catch_up` replays what came after."""
    store, why = _restored(folder, lake, log, groups)
    if store is not None:
        return store
    if why:
        _LOG.warning("the store is loaded from the lake: %s", why)
    return OnlineStore.from_lake(lake, groups)


def _restored(folder: Path, lake: Lake, log: Log, groups: Mapping[str, FeatureGroup]) -> tuple[OnlineStore | None, str | None]:
    """The store of the newest published tick, or None and why there is none (None where nothing was published)."""
    published = newest_published(folder)
    if published is None:
        return None, None
    try:
        position = position_of(published, lake, log)
        if published.tick_us <= newest_built_tick(lake, groups):
            return None, None
        view = Reading(groups).view(published)
    except UNUSABLE as error:
        return None, f"{published.path} cannot be used: {error}"
    return OnlineStore.of_blocks(view, position), None


def position_of(published: Published, lake: Lake, log: Log) -> tuple[int, ...]:
    """What its publisher had read. Raises ValueError if that was another lake or another log."""
    if published.told["origin"] != origin_of(lake):
        raise ValueError("it was made from other events than the lake holds")
    position, end = tuple(published.told["position"]), log.end()
    if len(position) != len(end) or any(held > there for held, there in zip(position, end, strict=True)):
        raise ValueError(f"it holds events up to {list(position)}, the event log ends at {list(end)}")
    return position
