"""Everything the server holds open, from the first file to the last flush: lake, event log, store, runner, models, forward log.

`start` loads in the background and can be watched through `missing()`; `stop` flushes. One server per home: one runner lands
the log in the lake, so a second server on the same home is refused. A server may have several processes (`serving.seat`): one
leads, makes ticks, lands, publishes and keeps the log's time going; the others map its ticks and read the log for their head.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import ge
from typing import Any

import pyarrow as pa

from serving.caches import Caches
from serving.catalogue import Catalogue
from serving.explain import Recent
from serving.fetch import Fetcher
from serving.forward_log import ForwardLog
from serving.huge_pages import collapse
from serving.hurry import CACHED_PAGE
from serving.hydrate import check_groups
from serving.last_pages import LastPages
from serving.log_table import as_table
from serving.log_writer import LogWriter
from serving.models import load_models, missing_models
from serving.new_tick import prepare
from serving.page import allowed_notes
from serving.readers import Readers
from serving.seat import Seat, take_seat
from serving.served import Served
from serving.settings import RISINGWAVE, Settings
from serving.world import World, check_trending
from streaming_sql.assembled import Assembled
from streaming_sql.cluster import Cluster
from streaming_sql.event_log import Log
from streaming_sql.open_log import open_log
from streaming_sql.pauses import settle
from streaming_sql.published import Publisher
from streaming_sql.published_ticks import PublishedTicks
from streaming_sql.records import DeadLetter, position_after
from streaming_sql.restore import STORE_FOLDER, open_store
from streaming_sql.runner import Runner
from streaming_sql.runner_report import RUNNER_FILE
from streaming_sql.settings import StreamSettings
from streaming_sql.short_head import troubles_of
from streaming_sql.table_store import TableStore
from warehouse.clock import Clock
from warehouse.errors import HeadraceError
from warehouse.features.declarations import FeatureGroup, declarations_hash, load_groups
from warehouse.features.kinds.declared import Kinds, load_kinds
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import landed_position

log = logging.getLogger(__name__)

RISINGWAVE_DSN = "RISINGWAVE_DSN"
LAND = "run `headrace land kuairand` (or `headrace land simulator`)"
TABLES_LOOKED_AT_EVERY_S = 30.0
"""A batch table that was loaded again is read again within this time."""
READ_AT_ONCE = 10_000
"""Records of the log."""
ABSORBED_WITHIN_S = 2.0
"""How long an answer to posted events waits for them to count in fresh features; they are durable before."""


def missing_parts(home: Home) -> list[str]:
    """What is not there yet and the command that makes it; empty when a server can start. Creates nothing but the folder.

    Unbuilt feature tables are not among it: the store then replays the events, which takes longer and comes to the same.
    """
    tables = set(Lake.open(home).tables())
    lacking = (
        [] if {"lake.events", "lake.notes", "lake.users"} <= tables else [f"the lake under {home.path} has no events; {LAND}"]
    )
    return lacking + missing_models(home)


class Engine:
    """Use `start` and `stop` once each. `world` is None until everything is loaded."""

    def __init__(
        self,
        home: Home,
        clock: Clock,
        settings: Settings,
        on_failure: Callable[[list[str]], None] | None = None,
        kinds: Kinds | None = None,
        server: str | None = None,
        is_resting: Callable[[], bool] = lambda: True,
    ):
        """server: which one this process is a worker of, as `seat.own_server` says; None for a server of one process.
        is_resting: whether no request is under way."""
        self.home, self.clock, self.settings, self._on_failure, self._kinds = home, clock, settings, on_failure, kinds
        self.world: World | None = None
        self.lake: Lake | None = None
        self.log: Log | None = None
        self.runner: Runner | None = None
        self.forward_log: ForwardLog[Served] | None = None
        self._log_writer: LogWriter | None = None
        self.recent = Recent(settings.recent_requests)
        self._missing: list[str] = ["not started"]
        self._loader: threading.Thread | None = None
        self._server, self._is_resting, self._stopping = server, is_resting, threading.Event()
        self.told_position: tuple[int, ...] = ()
        """After the newest event that was answered here."""
        self._told_lock = threading.Lock()
        self.seat: Seat | None = None
        self._ticks: PublishedTicks | None = None
        """Of a worker that follows."""

    def start(self) -> None:
        """Begins loading on a thread of its own, so that /livez and /readyz answer meanwhile."""
        self._missing = ["still loading: lake, online store and models"]
        self._loader = threading.Thread(target=self._load, name="load", daemon=True)
        self._loader.start()

    def wait(self, timeout_s: float) -> bool:
        """True once ready; False if loading failed or took longer."""
        if self._loader is not None:
            self._loader.join(timeout_s)
        return not self._missing

    @property
    def is_loading(self) -> bool:
        return self._loader is not None and self._loader.is_alive()

    def missing(self) -> list[str]:
        """What keeps the server from answering, each with the way out; empty when it is ready."""
        if not self._missing and self.runner is not None and not self.runner.is_healthy:
            return [f"the stream stopped: {self.runner.failure}; features no longer move, restart the server"]
        return list(self._missing)

    def troubles(self) -> list[str]:
        """What is wrong although feeds are answered; empty when nothing is."""
        if self._ticks is not None:
            return self._ticks.troubles() + ([] if self.world is None else troubles_of(self.world.store.view()))
        return self.world.cluster.troubles() if self.world is not None and self.world.cluster is not None else []

    def accept(self, events: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
        """Events into the log; durable, and part of fresh features, when it returns. (partition, offset) of each."""
        assert self.log is not None
        assert self.runner is not None
        assert self.world is not None
        positions = self.log.append(events)
        self._note(self.world, self.world.readers.note_events(events))  # the stream's thread, which tells it too, may be busy
        wanted = [0] * self.log.num_partitions
        for partition, offset in positions:
            wanted[partition] = max(wanted[partition], offset + 1)
        with self._told_lock:
            told = self.told_position or (0,) * len(wanted)
            self.told_position = tuple(map(max, told, wanted))
        if not self.runner.wait_until(tuple(wanted), ABSORBED_WITHIN_S):
            log.warning("events up to %s are durable, but not yet in fresh features after %s s", wanted, ABSORBED_WITHIN_S)
        return positions

    def counts(self, position: Sequence[int]) -> bool:
        """Whether features here hold every event below this position of the log."""
        return self.runner is not None and all(map(ge, self.runner.store.position, position))

    def bury(self, letters: Sequence[DeadLetter]) -> None:
        """Keeps refused events, with the reason, for lake.dead_letters; durable when it returns."""
        assert self.log is not None
        self.log.append_dead_letters(letters)

    def remember(self, served: Served) -> None:
        assert self.forward_log is not None
        self.recent.add(served)
        if self.world is not None and CACHED_PAGE not in served.steps.degraded:
            self.world.last_pages.keep(served)
        self.forward_log.offer(served)

    def stop(self) -> None:
        """Waits for loading to end, then writes what waits and closes everything."""
        self._stopping.set()
        if self._loader is not None:
            self._loader.join()
        self._missing = ["the server is stopping"]
        if self.forward_log is not None:
            self.forward_log.close()
        if self._log_writer is not None:
            self._log_writer.close()
        if self.runner is not None:
            try:
                self.runner.stop()
            except Exception:  # told before by /readyz; what can still be closed is closed
                log.exception("the stream had stopped early")
        if self.log is not None:
            self.log.close()
        if self.world is not None:
            self.world.tables.stop()
            if self._ticks is not None:
                self._ticks.stop()
            self.world.assembled.stop()
            if self.world.cluster is not None:
                self.world.cluster.stop()
            if self.world.fetcher is not None:
                self.world.fetcher.close()
        if self.seat is not None:
            self.seat.leave()

    def _load(self) -> None:
        try:
            missing = missing_parts(self.home)
            if missing:
                self._missing = missing
            else:
                self.seat = take_seat(self.home.log, self._server, self._stopping.is_set)
                self.world = self._open(self.seat.leads)
                settle()
                collapse()
                self._missing = []
                if self.seat.leads:
                    self.seat.ready()
                return
        except HeadraceError as error:
            self._missing = [str(error)]
        except Exception as error:
            log.exception("loading failed")
            self._missing = [f"loading failed: {type(error).__name__}: {error}; the server's log has the traceback"]
        log.error("not ready: %s", "; ".join(self._missing))
        if self._on_failure is not None:
            self._on_failure(self.missing())

    def _open(self, leads: bool) -> World:
        groups, kinds = load_groups(), self._kinds or load_kinds()
        check_groups(groups, kinds)
        lake = self.lake = Lake.open(self.home)
        stream = StreamSettings.from_env()
        event_log = self.log = open_log(self.home, lake, self.clock, stream)
        check_trending(groups, self.settings.trending_feature)
        folder, cluster = self.home.online / STORE_FOLDER, self._cluster(groups)
        if cluster is not None:
            cluster.check_log(event_log, lake)
            store = cluster.open_store(event_log.end)
        elif not leads:
            self._ticks = PublishedTicks(folder, groups)
            store = self._ticks.open_store(lake, event_log)
        else:
            if unbuilt := [name for name in groups if not lake.exists(f"features.{name}")]:
                log.warning("%s not built: replaying all events; `dbt build` makes the start faster", ", ".join(unbuilt))
            store = open_store(folder, lake, event_log, groups)
        runner = self.runner = Runner(
            lake,
            event_log,
            store,
            groups,
            self.clock,
            stream.runner(),
            self.home.online / RUNNER_FILE,
            only_reads=not leads,
            publisher=Publisher(folder, groups) if leads and cluster is None else None,
            elsewhere=cluster or self._ticks,
            max_head_events=self.settings.features_head_events if cluster or self._ticks else None,
        )
        runner.catch_up()
        if leads:
            runner.flush()
        if self._server is not None:
            runner.publish()  # what the workers that follow start from
        tables = TableStore(lake, kinds.tables)
        tables.refresh(store.view().tick_us)
        catalogue = Catalogue.from_lake(lake)
        notes = [(note_id,) for note_id in catalogue.note_ids]
        authors = [(author_id,) for author_id in catalogue.rows_of_author]
        world = World(
            clock=self.clock,
            settings=self.settings,
            groups=groups,
            declarations_hash=declarations_hash(groups),
            store=store,
            catalogue=catalogue,
            readers=self._readers(lake, event_log),
            last_pages=LastPages(self.settings.last_pages, self.settings.last_page_minutes),
            allowed_N=allowed_notes(self.settings, catalogue.note_ids, catalogue.author_ids, catalogue.topics),
            models=load_models(self.home, groups, catalogue, self.settings, kinds),
            kinds=kinds,
            fetcher=Fetcher(kinds.http) if kinds.http else None,
            tables=tables,
            caches=Caches(self.settings),
            cluster=cluster,
            assembled=Assembled(store.plans, {("note_id",): notes, ("author_id",): authors}),
        )
        world.assembled.assemble(store.view())
        lock = self.home.log / "forward-log.lock"
        self._log_writer = LogWriter(self.home, lock)
        self.forward_log = ForwardLog(
            lake,
            self.settings.forward_log_queue,
            self.settings.forward_log_rows,
            self.settings.forward_log_age_s,
            as_table,
            lock,
            self._log_writer,
            self._is_resting,
        )
        self.forward_log.start()

        def hear(records: pa.Table) -> None:
            current = self.world or world
            self._note(current, current.readers.note_records(records))

        runner.start(hear)
        if cluster is not None:
            cluster.start(self.settings.features_look_s)
        if self._ticks is not None:
            self._ticks.start()
        world.assembled.start(store.view, partial(prepare, world))
        if tables.tables:
            tables.start(lambda: store.view().tick_us, TABLES_LOOKED_AT_EVERY_S)
        return world

    def _cluster(self, groups: Mapping[str, FeatureGroup]) -> Cluster | None:
        """What features are read from, if the settings say so. Raises HeadraceError without its address."""
        settings = self.settings
        if settings.features != RISINGWAVE:
            return None
        dsn = os.environ.get(RISINGWAVE_DSN, "").strip()
        if not dsn:
            raise HeadraceError(
                f"features: {RISINGWAVE} needs the cluster's address in {RISINGWAVE_DSN}, such as "
                "`host=risingwave port=4566 user=root dbname=dev`"
            )
        timeout_s = settings.features_timeout_ms / 1000
        return Cluster(dsn, groups, timeout_s, settings.inference_threads, settings.cached_readers)

    @staticmethod
    def _note(world: World, user_ids: Iterable[str]) -> None:
        """What is kept of a reader is stale once there are new events of theirs."""
        for user_id in user_ids:
            world.last_pages.forget(user_id)

    def _readers(self, lake: Lake, event_log: Log) -> Readers:
        """What the lake knows, and the log's records that had not landed when the lake was read."""
        position = landed_position(lake)
        readers = Readers.from_lake(lake, self.settings.seen_per_user, self.clock.now_us())
        while (records := event_log.read(position, READ_AT_ONCE)).num_rows:
            readers.note_records(records)
            position = position_after(position, records)
        return readers
