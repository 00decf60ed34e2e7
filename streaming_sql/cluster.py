"""A server's features beside a RisingWave cluster: blocks from its views, the head from the log's tail.

    groups of notes and authors    read whole, once a tick, ahead of the store (`Ticks`)
    groups that begin with a reader  read when the reader asks, once a tick, in one statement
    events that no block holds      the log's, as in the embedded store

A tick counts once the cluster has closed it and this process has read the log as far. While the cluster is away the store stays
at its tick, what is not known of a reader at that tick is answered from an earlier one, and the head is bounded.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta

import pyarrow as pa
import pyarrow.compute as pc
from cachetools import LRUCache

from streaming_sql.block_views import READER, BlockViews
from streaming_sql.event_log import Log
from streaming_sql.group_state import GroupState
from streaming_sql.head import Head
from streaming_sql.key_index import KeyIndex
from streaming_sql.online_store import AddedBlocks, OnlineStore, StoreView, Work, without_withdrawn
from streaming_sql.postgres_reader import PostgresReader, ReaderSettings
from streaming_sql.reader_head import ReaderHead
from streaming_sql.runner_report import iso
from streaming_sql.same_log import check_same_log
from streaming_sql.short_head import troubles_of, words_of
from streaming_sql.text_codes import TextCodes
from streaming_sql.tick_news import TickNews
from warehouse.errors import HeadraceError
from warehouse.features.declarations import FeatureGroup
from warehouse.lake import Lake

_LOG = logging.getLogger("headrace.stream")
AWAY, STALE = "risingwave_away", "reader_features_stale"
"""What is said of a request: the cluster did not answer lately; the reader's own blocks are of an earlier tick, or none; events
since the tick had no room in the head."""
_WHOLE_GROUPS = ReaderSettings(statement_timeout_s=120.0, attempts=2)
_STOPS_WITHIN_S = 2.0


@dataclass
class _OfReader:
    """What is known of one reader: blocks of the groups that begin with one, at a tick."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    tick_us: int = 0
    states: dict[str, GroupState] = field(default_factory=dict)
    withdrawn: Mapping[str, pa.Table] = field(default_factory=dict)
    """What `fresh_layers` of the states were made with."""


class Cluster:
    """`open_store` once, then `start`; any number of threads ask for views of a reader, one takes ticks."""

    def __init__(
        self,
        dsn: str,
        groups: Mapping[str, FeatureGroup],
        timeout_s: float,
        connections: int,
        num_readers: int,
    ):
        """timeout_s: how long a request waits for a statement, which is tried again only where the connection broke before;
        num_readers: whose blocks are kept."""
        self._dsn, self._groups = dsn, dict(groups)
        self._of_reader = tuple(name for name, group in groups.items() if group.entity_keys[0] == READER)
        self._whole = tuple(name for name in groups if name not in self._of_reader)
        self._views = BlockViews(groups)
        quick = ReaderSettings(
            connections + 1,
            statement_timeout_s=timeout_s,
            attempts=2,
            first_pause_s=timeout_s / 10,
            no_attempt_after_s=timeout_s / 2,
        )
        self._quick, self._bulk = PostgresReader(dsn, quick), PostgresReader(dsn, _WHOLE_GROUPS)
        self._readers: LRUCache[str, _OfReader] = LRUCache(max(num_readers, 1))
        self._readers_lock = threading.Lock()
        self._ahead: AddedBlocks | None = None
        self._read_through_us = 0
        """The tick up to which whole groups were read: `take` gives each once, so the store's is no newer."""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._away_since_s: float | None = None
        self.store = OnlineStore({})

    def check_log(self, log: Log, lake: Lake) -> None:
        """Raises HeadraceError unless the views read this log, as far as can be told, or if the cluster does not answer."""
        check_same_log(self._bulk, log, lake)

    def open_store(self, end_of_log: Callable[[], tuple[int, ...]]) -> OnlineStore:
        """A store at the cluster's closed tick, for a runner to take to the log's end. Raises HeadraceError if the cluster does
        not answer, lacks the views, or has closed no tick."""
        tick_us = self._views.closed_tick(self._bulk)
        if not tick_us:
            raise HeadraceError(
                "RisingWave has closed no tick yet: a partition of the log is silent there; is its topic the event log's?"
            )
        store = self.store = OnlineStore(self._groups)
        store.advance(store.position, {}, tick=AddedBlocks(tick_us, self._read_whole(0, tick_us)))
        self._read_through_us = tick_us
        store.blocks_through = end_of_log()  # asked after the tick: what the cluster had read by then is before it
        return store

    def start(self, every_s: float) -> None:
        """Waits for new ticks on a thread of its own until `stop`; asks for them so often where no subscription tells them."""
        self._thread = threading.Thread(
            target=self._follow, args=(TickNews(self._dsn, every_s),), name="headrace-risingwave", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_STOPS_WITHIN_S)  # it may be waiting for a cluster that hangs
        self._quick.close()
        self._bulk.close()

    def take(self, closed_us: int) -> AddedBlocks | None:
        """The store's next tick, as `Feed` asks; None where there is none up to closed_us."""
        ahead = self._ahead
        if ahead is None or ahead.tick_us > closed_us:
            return None
        self._ahead = None
        return ahead

    @property
    def is_away(self) -> bool:
        """Whether the newest read failed; until one succeeds, requests do not try."""
        return self._away_since_s is not None

    @property
    def away_s(self) -> float:
        """How long ago reads began to fail, seconds; 0 while they do not."""
        since_s = self._away_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def troubles(self) -> list[str]:
        """What an operator should know of features that are served nevertheless; empty when all is well."""
        view, said = self.store.view(), []
        if self.is_away:
            said.append(
                f"RisingWave has not answered for {timedelta(seconds=round(self.away_s))}: blocks stay those of "
                f"{iso(view.tick_us)}, events since count from memory ({self.store.num_head_events():,} of them)"
            )
        return said + troubles_of(view)

    def look(self) -> None:
        """Reads the tick, and what a new one brings to the groups that are held whole. Raises HeadraceError if it cannot."""
        tick_us = self._views.closed_tick(self._quick)
        if self._ahead is None and tick_us > self._read_through_us:
            self._ahead = AddedBlocks(tick_us, self._read_whole(self._read_through_us, tick_us))
            self._read_through_us = tick_us

    def view_of(self, user_id: str) -> tuple[StoreView, list[str]]:
        """The store's view with the reader's own blocks in it, and what is to be said of it (AWAY, STALE, SHORT)."""
        entry = self._entry(user_id)
        with entry.lock:
            view = self.store.view()
            if entry.tick_us < view.tick_us and not self.is_away:
                self._heard(lambda: self._read(entry, user_id, view.tick_us))
            said = [AWAY] * self.is_away + [STALE] * (entry.tick_us < view.tick_us) + words_of(view)
            states = {name: self._state(entry, view, name, user_id) for name in self._of_reader}
            entry.withdrawn = view.withdrawn
        return replace(view, groups={**view.groups, **states}), said

    def _entry(self, user_id: str) -> _OfReader:
        with self._readers_lock:
            entry = self._readers.get(user_id)
            if entry is None:
                entry = self._readers[user_id] = _OfReader()
            return entry

    def _read(self, entry: _OfReader, user_id: str, tick_us: int) -> None:
        from_us = {name: self.store.plans[name].keep_from_us(tick_us) for name in self._of_reader}
        tick = AddedBlocks(tick_us, self._views.rows_of(self._quick, user_id, entry.tick_us, tick_us, from_us))
        shared = self.store.view().groups
        states = {name: entry.states.get(name) or _nothing_of(shared[name]) for name in self._of_reader}
        entry.states = {name: tick.of(state, Work()) for name, state in states.items()}
        entry.tick_us, entry.withdrawn = tick_us, {}

    def _state(self, entry: _OfReader, view: StoreView, name: str, user_id: str) -> GroupState:
        """The group as the view has it, with the reader's blocks and the codes of the texts in them."""
        shared = view.groups[name]
        state = entry.states.get(name) or _nothing_of(shared)
        if entry.withdrawn is not view.withdrawn:
            rows = view.withdrawn.get(name)
            own = None if rows is None else rows.filter(pc.equal(rows[READER], user_id))
            state = replace(state, fresh_layers=without_withdrawn(state, own))
        entry.states[name] = state
        return replace(state, head=ReaderHead.of(shared, state.codes))

    def _read_whole(self, after_us: int, tick_us: int) -> dict[str, pa.Table]:
        plans = self.store.plans
        return {
            name: self._views.rows(self._bulk, name, after_us, tick_us, plans[name].keep_from_us(tick_us))
            for name in self._whole
        }

    def _follow(self, news: TickNews) -> None:
        while not self._stopping.is_set():
            told_us = news.wait(self._stopping)
            # what was told before may have waited for the store to take what is ahead
            if told_us is None or told_us > self._read_through_us or self.is_away:
                self._heard(self.look)
        news.close()

    def _heard(self, read: Callable[[], None]) -> None:
        """What `read` says of the cluster is kept, and told once when it changes. Whatever goes wrong, nobody who reads ends of
        it."""
        try:
            read()
        except Exception as error:
            if not self.is_away:
                is_expected = isinstance(error, HeadraceError)
                _LOG.warning("features stay as they are: %s", error, exc_info=None if is_expected else error)
                self._away_since_s = time.monotonic()
            return
        if self.is_away:
            _LOG.warning("RisingWave answers again")
        self._away_since_s = None


def _nothing_of(shared: GroupState) -> GroupState:
    """A group without blocks, to which those of one reader are added. Its tables go with the reader."""
    return replace(shared, index=KeyIndex(shared.plan.group.keys), codes=TextCodes(), layers=(), head=Head(), fresh_layers=None)
