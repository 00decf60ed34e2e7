"""What a request may use, opened and held together: the read side of the server."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from serving.budget import Pace
from serving.catalogue import Catalogue
from serving.fetch import Fetcher
from serving.models import Models
from serving.readers import Readers
from serving.settings import Settings
from streaming_sql.assembled import Assembled
from streaming_sql.online_store import OnlineStore, StoreView
from streaming_sql.table_store import TableStore
from warehouse.clock import Clock
from warehouse.features.declarations import FeatureGroup
from warehouse.features.kinds.declared import Kinds

if TYPE_CHECKING:  # it keeps answers, which know the world they come from
    from serving.last_pages import LastPages

TRENDING_FEATURE = "note_num_clicks_1d"


@dataclass(frozen=True)
class World:
    """Everything the cascade reads; nothing here is written by a request."""

    clock: Clock
    settings: Settings
    groups: Mapping[str, FeatureGroup]
    declarations_hash: str
    store: OnlineStore
    catalogue: Catalogue
    readers: Readers
    models: Models
    last_pages: "LastPages"
    allowed_N: np.ndarray
    """bool [N]: notes that the settings do not block."""
    kinds: Kinds
    tables: TableStore
    assembled: Assembled
    fetcher: Fetcher | None = None
    pace: Pace = field(default_factory=Pace)
    trending: "Trending" = field(default_factory=lambda: Trending())


class Trending:
    """Notes by clicks of the last day, most first. Between ticks a block value never changes, so one tick costs one sort."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tick_us: int | None = None
        self._rows = np.empty(0, dtype=np.int64)

    def rows(self, world: World, view: StoreView, t_us: int) -> np.ndarray:
        """int64: rows of the catalogue that were clicked in the day before the view's tick."""
        with self._lock:
            if self._tick_us != view.tick_us:
                self._rows = _most_clicked(world, view, t_us)
                self._tick_us = view.tick_us
            return self._rows


def _most_clicked(world: World, view: StoreView, t_us: int) -> np.ndarray:
    group = next(group for group in world.groups.values() if TRENDING_FEATURE in group.feature_names)
    matrix = view.assemble(group.name, [(note_id,) for note_id in world.catalogue.note_ids], t_us)
    clicks_N = np.nan_to_num(matrix.values[:, matrix.names.index(TRENDING_FEATURE)])
    order = np.argsort(-clicks_N, kind="stable")
    return order[clicks_N[order] > 0]
