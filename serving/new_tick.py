"""What hangs from a tick beside its features, made ready before requests read the tick: the first of them would
make it each for itself, all at once.
"""

from collections.abc import Callable

import numpy as np

from serving.hydrate import Hydrated, hydrate_candidates
from serving.world import World
from streaming_sql.assembled import Assembled
from streaming_sql.online_store import StoreView
from warehouse.time_algebra import GRACE_US

_NOBODY = ""
"""A reader never met: only what notes add by themselves is kept."""


def prepare(world: World, view: StoreView, assembled: Assembled) -> Callable[[], None]:
    """The order of what is trending, and what L1 and L2 keep of the notes that requests asked for, where those changed. Returns
    what is to be called as the tick is taken into use. assembled: holds it."""
    t_us = max(world.clock.now_us(), view.tick_us + GRACE_US)
    world.trending.rows(world, view, t_us, assembled)

    def features(row_M: np.ndarray) -> Hydrated:
        return hydrate_candidates(view, world.groups, world.catalogue, _NOBODY, row_M, t_us, world.tables, assembled)

    keep = []
    for first_layer, tag_N in world.models.first_layers().values():
        row_M = first_layer.memo.kept(tag_N)
        keep.append(first_layer.remade(features(row_M), row_M, tag_N[row_M]))

    def take_into_use() -> None:
        for each in keep:
            each()

    return take_into_use
