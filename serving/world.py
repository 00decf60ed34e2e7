"""What a request may use, opened and held together: the read side of the server."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from serving.budget import Pace
from serving.caches import Caches
from serving.catalogue import Catalogue
from serving.fetch import Fetcher
from serving.models import Models
from serving.readers import Readers
from serving.settings import Settings
from serving.showable import Showable
from streaming_sql.assembled import Assembled
from streaming_sql.cluster import Cluster
from streaming_sql.online_store import OnlineStore, StoreView
from streaming_sql.short_head import words_of
from streaming_sql.table_store import TableStore
from warehouse.clock import Clock
from warehouse.errors import HeadraceError
from warehouse.features.declarations import FeatureGroup
from warehouse.features.kinds.declared import Kinds

_ASSEMBLED_WITHIN_S = 10.0
"""However long the newest tick's features take, requests read it after this."""
_TICKS_KEPT = 2

if TYPE_CHECKING:  # it keeps answers, which know the world they come from
    from serving.last_pages import LastPages


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
    caches: Caches
    fetcher: Fetcher | None = None
    cluster: Cluster | None = None
    """Where the reader's own blocks come from, if not from the store."""
    pace: Pace = field(default_factory=Pace)
    trending: "Trending" = field(default_factory=lambda: Trending())

    @cached_property
    def showable(self) -> Showable:
        return Showable(self.catalogue.created_us_N, self.allowed_N)

    def view_of(self, user_id: str) -> tuple[StoreView, list[str]]:
        """What a request of this reader reads, and what of it is degraded."""
        if self.cluster is not None:
            return self.cluster.view_of(user_id)
        view = self.store.view()
        if not self.assembled.holds(view) and (before := self._before(user_id)) is not None:
            view = before
        return view, words_of(view)

    def _before(self, user_id: str) -> StoreView | None:
        """What the tick before read last, while the new tick's features are assembled, which requests would else do for
        themselves; None where that lacks an event of the reader, or the new tick has taken too long."""
        before = self.store.before()
        is_too_late = time.monotonic() - before.replaced_s > _ASSEMBLED_WITHIN_S
        if is_too_late or not self._is_fresh_by_reader or not self.assembled.holds(before.view):
            return None
        return before.view if self.readers.noted_s(user_id) < before.made_s else None

    @cached_property
    def _is_fresh_by_reader(self) -> bool:
        """Whether an event changes at once no features but those of its own reader."""
        return all("user_id" in plan.group.entity_keys for plan in self.store.plans.values() if plan.fresh)


class Trending:
    """Notes by `trending_feature` of the settings, most first. A block value never changes between ticks: one sort a tick.
    Until a new tick's features are assembled the order is that of the tick before, so that no request waits for all notes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of_ticks: dict[int, np.ndarray] = {}

    def rows(self, world: World, view: StoreView, t_us: int, assembled: Assembled | None = None) -> np.ndarray:
        """int64: rows of the catalogue of which the feature was more than 0. assembled: where the tick is held, if not where
        the world holds others."""
        if (rows := self._of_ticks.get(view.tick_us)) is not None:
            return rows
        with self._lock:
            if (rows := self._of_ticks.get(view.tick_us)) is not None:
                return rows
            newest = max(self._of_ticks, default=None)
            count_N = _of_all_notes(world, view, t_us, assembled or world.assembled, must_wait=newest is None)
            if count_N is None:
                assert newest is not None
                return self._of_ticks[newest]
            rows = np.flatnonzero(count_N > 0)
            rows = rows[np.argsort(-count_N[rows], kind="stable")]
            self._of_ticks = {tick_us: self._of_ticks[tick_us] for tick_us in sorted(self._of_ticks)[-_TICKS_KEPT + 1 :]}
            self._of_ticks[view.tick_us] = rows
            return rows


def check_trending(groups: Mapping[str, FeatureGroup], feature: str) -> None:
    """Raises HeadraceError unless the feature is a number of a group of notes."""
    of_notes = [name for group in groups.values() if group.entity_keys == ("note_id",) for name in group.feature_names]
    if feature not in of_notes:
        raise HeadraceError(
            "serving settings: trending_feature must be a declared feature of notes "
            f"such as {', '.join(of_notes[:3])}; got {feature!r}"
        )


def _of_all_notes(world: World, view: StoreView, t_us: int, assembled: Assembled, must_wait: bool) -> np.ndarray | None:
    """float64 [N]: the trending feature; None where it is not assembled yet and need not be waited for."""
    feature = world.settings.trending_feature
    group = next(group for group in world.groups.values() if feature in group.feature_names)
    matrix = assembled.matrix(view, group.name)
    if matrix is None and (must_wait or group.name not in assembled.groups):
        matrix = view.assemble(group.name, [(note_id,) for note_id in world.catalogue.note_ids], t_us)
    return None if matrix is None else matrix.values[:, matrix.names.index(feature)]
