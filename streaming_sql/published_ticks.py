"""The ticks that a leader publishes, for the store of another process on the home: layers mapped, keys and texts read once.

The process reads the log itself: what no block of its tick holds is its own head. A tick counts once it is published *and* the
process has read the log as far. Without a leader the store stays at its tick, and the head grows to its bound.
"""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from streaming_sql.event_log import Log
from streaming_sql.group_state import GroupState
from streaming_sql.online_store import OnlineStore, StoreView, Work
from streaming_sql.published import UNUSABLE, Published, Reading, newest_published
from streaming_sql.restore import position_of
from warehouse.errors import HeadraceError
from warehouse.features.declarations import FeatureGroup
from warehouse.lake import Lake

_LOG = logging.getLogger("headrace.stream")
_LOOKED_AT_EVERY_S = 0.2
_STAYS = "features stay at their tick"


@dataclass(frozen=True)
class PublishedTick:
    """A tick that `OnlineStore.advance` moves to."""

    view: StoreView

    @property
    def tick_us(self) -> int:
        return self.view.tick_us

    def of(self, state: GroupState, work: Work) -> GroupState:
        return state.at(self.tick_us, self.view.groups[state.plan.group.name])


class PublishedTicks:
    """`open_store` once, then `start`, or `look` now and then; one thread takes ticks."""

    def __init__(self, folder: Path, groups: Mapping[str, FeatureGroup]):
        self._folder, self._groups, self._reading = folder, dict(groups), Reading(groups)
        self._ahead: PublishedTick | None = None
        self._read_through_us = 0
        self._refused: Published | None = None
        self._why_refused = ""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def open_store(self, lake: Lake, log: Log) -> OnlineStore:
        """A store at the newest published tick, for a runner to take to the log's end; at the lake's if that one cannot be
        used, which is said. Raises HeadraceError if it was published for other declarations."""
        published = newest_published(self._folder)
        store = None if published is None else self._restored(published, lake, log)
        store = store or OnlineStore.from_lake(lake, self._groups)
        self._read_through_us = store.tick_us
        return store

    def _restored(self, published: Published, lake: Lake, log: Log) -> OnlineStore | None:
        if not self._reading.has_same_meaning(published):
            raise HeadraceError(
                f"{published.path} was published for other feature declarations: stop the server and start all its workers anew"
            )
        store = OnlineStore(self._groups, position=(0,) * log.num_partitions)
        try:
            position = position_of(published, lake, log)
            store.advance(store.position, {}, tick=PublishedTick(self._reading.view(published)))
        except UNUSABLE as error:
            self._refuse(published, error, "the store is loaded from the lake")
            return None
        store.blocks_through = position
        return store

    def start(self) -> None:
        """Looks for new ticks on a thread of its own, until `stop`."""
        self._thread = threading.Thread(target=self._follow, name="headrace-published", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def take(self, closed_us: int) -> PublishedTick | None:
        """The store's next tick, as `Feed` asks; None where none is published up to closed_us."""
        ahead = self._ahead
        if ahead is None or ahead.tick_us > closed_us:
            return None
        self._ahead = None
        return ahead

    def look(self) -> None:
        """Maps the newest tick, if there is a newer one than that before it and that one was taken. One that cannot be used is
        said and left out: the store stays at its tick until a later one can."""
        if self._ahead is not None:
            return
        published = newest_published(self._folder, self._read_through_us)
        if published is None or published == self._refused:
            return
        try:
            view = self._reading.view(published)
        except FileNotFoundError:  # swept away meanwhile: there is a newer one
            return
        except UNUSABLE as error:
            self._refuse(published, error, _STAYS)
            return
        self._read_through_us, self._ahead, self._refused = view.tick_us, PublishedTick(view), None

    def _refuse(self, published: Published, error: Exception, so: str) -> None:
        self._refused, self._why_refused = published, f"{published.path} cannot be used: {error}; restart the server"
        _LOG.warning("%s: %s", so, self._why_refused)

    def troubles(self) -> list[str]:
        """What an operator should know of features that are served nevertheless; empty when all is well."""
        return [] if self._refused is None else [f"{_STAYS}: {self._why_refused}"]

    def _follow(self) -> None:
        while not self._stopping.wait(_LOOKED_AT_EVERY_S):
            try:
                self.look()
            except Exception:  # what can be read of the next tick will be
                _LOG.exception("a published tick was not read")
