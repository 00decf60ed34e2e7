"""The embedded runner: log → head, ticks → blocks → store, log → lake. All of its state can be rebuilt from lake and log.

`step()` does one round and is deterministic under a manual clock; `start()` runs rounds in threads (feeding, landing and
publishing, so that a slow commit delays neither an event's way to the head nor a tick's to other processes) until `stop()`.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from streaming_sql.attribute_tables import LakeTables
from streaming_sql.event_log import Log
from streaming_sql.feed import REMEMBERED, Feed, Taken, Ticks
from streaming_sql.history import LakeAndLog
from streaming_sql.lander import Lander, LanderSettings
from streaming_sql.online_store import OnlineStore
from streaming_sql.published import Publisher
from streaming_sql.restore import origin_of
from streaming_sql.runner_report import FEATURES, write_runner_report
from warehouse.clock import Clock
from warehouse.errors import HeadraceError
from warehouse.events import EVENTS_SCHEMA
from warehouse.features.declarations import FeatureGroup
from warehouse.lake import Lake
from warehouse.landing import EVENTS, landed_position
from warehouse.time_algebra import DUPLICATE_MEMORY_US, FURTHEST_AHEAD_US, SECOND_US

_LOG = logging.getLogger("headrace.stream")
_IDLE_AFTER_S = 1.0
_LANDER_RESTS_S = 1.0
_PUBLISHER_RESTS_S = 1.0
"""Then a tick that a full disk did not take is tried again."""
Progress = Callable[[int, int], None]
"""Called with (records replayed, records in all)."""
Hear = Callable[[pa.Table], None]
"""Called with records of the log (EVENTS_SCHEMA), on the thread that feeds."""


@dataclass(frozen=True)
class RunnerSettings:
    """How much a round reads, and how long a partition may be silent before it gets a heartbeat."""

    read_limit: int = 10_000
    replay_limit: int = 200_000
    heartbeat_idle_us: int = 5 * SECOND_US
    poll_seconds: float = 0.005
    idle_poll_seconds: float = 0.02
    """Between looks into a log that nothing came into for `_IDLE_AFTER_S`; whoever waits for a record makes it look at once."""
    lander: LanderSettings = field(default_factory=LanderSettings)


@dataclass(frozen=True)
class StepReport:
    """What one round did, and where it left the store."""

    num_records: int
    num_events: int
    num_duplicates: int
    num_dead: int
    num_late: int
    num_landed: int
    closed_tick_us: int | None
    """The tick that this round closed, if it did."""
    tick_us: int
    position: tuple[int, ...]
    num_behind: int
    """Records in the log that have not been read."""


class Runner:
    """Keeps `store` up to date with `log`, and the lake with both."""

    def __init__(
        self,
        lake: Lake,
        log: Log,
        store: OnlineStore,
        groups: Mapping[str, FeatureGroup],
        clock: Clock,
        settings: RunnerSettings | None = None,
        status_path: Path | None = None,
        only_reads: bool = False,
        publisher: Publisher | None = None,
        elsewhere: Ticks | None = None,
        max_head_events: int | None = None,
    ):
        """status_path: where to leave a report for `headrace stream status` about once a second; none by default.
        only_reads: it follows the log beside a runner that lands, in another process, and writes neither lake nor log.
        publisher: what writes each tick for other processes and the next start; none by default. elsewhere, max_head_events: of
        `Feed`."""
        self._lake, self._log, self._clock = lake, log, clock
        self._settings, self._status_path = settings or RunnerSettings(), status_path
        self._history, tables = LakeAndLog(lake, log), LakeTables(lake, groups)
        self._feed = Feed(store, groups, (0,) * log.num_partitions, self._history, tables, elsewhere, max_head_events)
        self._only_reads, self._publisher, self._origin = only_reads, publisher, origin_of(lake) if publisher else {}
        self._its_lander = None if only_reads else Lander(lake, log, clock, self._settings.lander)
        self._stopping, self._awaited, self._ticked = threading.Event(), threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._caught_up = False
        self._hear: Hear | None = None
        self._moved = threading.Condition()
        self._reported = (time.monotonic(), self._feed.position)
        self.totals = Taken()
        self.failure: BaseException | None = None

    @property
    def _lander(self) -> Lander:
        if self._its_lander is None:
            raise HeadraceError("this runner only reads; it cannot land")
        return self._its_lander

    @property
    def store(self) -> OnlineStore:
        return self._feed.store

    def catch_up(self, progress: Progress | None = None) -> int:
        """Replays what the store's blocks do not hold: from the lake, then from the log up to its end. Returns records read.

        Call it once, before `step` or `start`. The store is at the log's end on return.
        """
        landed = landed_position(self._lake)
        done = self._replay_lake(progress, sum(self._log.end()) - sum(landed))
        self._feed.position = tuple(max(a, b) for a, b in zip(self._feed.position, landed, strict=True))
        self._caught_up = True
        end = self._log.end()
        total = done + sum(end) - sum(self._feed.position)
        while sum(self._feed.position) < sum(end):
            held = self.store.blocks_through
            is_history = any(at < there for at, there in zip(self._feed.position, held, strict=True))
            report = self._feed_once(self._settings.replay_limit, is_history)
            done += report[0]
            if progress:
                progress(min(done, total), total)
        return done

    def _replay_lake(self, progress: Progress | None, num_in_log: int) -> int:
        if not self._lake.exists(EVENTS) or self._lake.table(EVENTS).current_snapshot() is None:
            return 0
        # before this instant nothing can have landed that the blocks do not hold: event_ts is at most F ahead of landed_at
        held_us = self._feed.store.tick_us - FURTHEST_AHEAD_US
        done = 0
        with self._lake.duckdb() as connection:

            def batches(columns: Sequence[str], condition: str) -> Iterator[pa.Table]:
                rows = connection.execute(
                    f"select {', '.join(columns)} from lake.events where {condition} "
                    "order by landed_at, log_partition, log_offset"
                )
                schema = pa.schema([EVENTS_SCHEMA.field(name) for name in columns])
                for batch in rows.to_arrow_reader(self._settings.replay_limit):
                    yield pa.Table.from_batches([batch]).cast(schema)

            since, held = (f"make_timestamptz({max(instant, 0)})" for instant in (held_us - DUPLICATE_MEMORY_US, held_us))
            # a retraction's own id may have arrived first before that, and then the retraction is none
            retracting = f"select event_id from lake.events where event_type = 'retraction' and landed_at >= {since}"
            wanted = f"(landed_at >= {since} or event_id in ({retracting}))"
            (total,) = connection.execute(f"select count(*) from lake.events where {wanted}").fetchall()[0]
            for records in batches(REMEMBERED, f"{wanted} and landed_at < {held}"):
                self._feed.remember(records)
                done = _told(progress, done + records.num_rows, total + num_in_log)
            for records in batches(EVENTS_SCHEMA.names, f"landed_at >= {held}"):
                self._count(self._feed.take(records, is_history=True))
                done = _told(progress, done + records.num_rows, total + num_in_log)
        return done

    def step(self) -> StepReport:
        """One round: heartbeats, the next records into the store, a commit to the lake if one is due."""
        self._must_have_caught_up()
        num_records, taken = self._feed_once(self._settings.read_limit)
        num_landed = self._lander.step()
        return StepReport(
            num_records,
            taken.num_events,
            taken.num_duplicates,
            taken.num_dead,
            taken.num_late,
            num_landed,
            taken.closed_tick_us,
            self.store.tick_us,
            self.store.position,
            sum(self._log.end()) - sum(self._feed.position),
        )

    def _must_have_caught_up(self) -> None:
        if not self._caught_up:
            raise HeadraceError("the runner has not caught up with the lake: call catch_up() first")

    def _feed_once(self, limit: int, is_history: bool = False) -> tuple[int, Taken]:
        if not self._only_reads:
            self._log.heartbeat(self._settings.heartbeat_idle_us)
        records = self._log.read(self._feed.position, limit)
        if self._hear is not None and records.num_rows:
            self._hear(records)
        taken = self._feed.take(records, is_history) if records.num_rows else self._feed.move()
        self._count(taken)
        if taken.closed_tick_us is not None:
            self._ticked.set()
        if records.num_rows:
            self._tell_waiting()
        return records.num_rows, taken

    def _feed_events(self) -> int:
        """How many events came. Heartbeats come all the time, and are no sign of more."""
        _, taken = self._feed_once(self._settings.read_limit)
        return taken.num_events + taken.num_duplicates + taken.num_dead + taken.num_retractions

    def _tell_waiting(self) -> None:
        with self._moved:
            self._moved.notify_all()

    def _count(self, taken: Taken) -> None:
        self.totals.num_events += taken.num_events
        self.totals.num_duplicates += taken.num_duplicates
        self.totals.num_dead += taken.num_dead
        self.totals.num_late += taken.num_late
        self.totals.num_retractions += taken.num_retractions

    def flush(self) -> int:
        """Lands everything in the log now; returns the number of records landed."""
        return self._lander.flush()

    def start(self, hear: Hear | None = None) -> None:
        """Runs until `stop()`. If a round fails, the thread ends, `failure` holds why and `is_healthy` turns false. hear: told
        all records that come from now on, before the store has them."""
        self._must_have_caught_up()
        if self._threads:
            raise HeadraceError("the runner is already running")
        self._stopping.clear()
        self._hear = hear
        rounds: dict[str, tuple[Callable[[], int], Callable[[float], object]]]
        rounds = {"feed": (self._feed_events, self._rest_of_feed)}
        if not self._only_reads:
            rounds["lander"] = (self._land_once, lambda idle_s: self._stopping.wait(_LANDER_RESTS_S))
        if self._publisher is not None:
            rounds["publisher"] = (self.publish, self._rest_of_publisher)
        self._threads = [
            threading.Thread(target=self._run, args=its, name=f"headrace-{name}", daemon=True) for name, its in rounds.items()
        ]
        for thread in self._threads:
            thread.start()

    def report(self) -> None:
        """Writes the report for `headrace stream status`, and the position into the log, where other machines can see it."""
        position = self._feed.position
        if position != self._reported[1]:
            self._log.commit(FEATURES, position)
        now_s = time.monotonic()
        per_s = (sum(position) - sum(self._reported[1])) / max(now_s - self._reported[0], 1e-3)
        self._reported = (now_s, position)
        if self._status_path is not None:
            num_behind = sum(self._log.end()) - sum(position)
            through_us = self._feed.read_through_us
            write_runner_report(
                self._status_path,
                self.store,
                self.totals,
                num_behind,
                through_us,
                per_s,
                self._clock,
                len(self._feed.arrivals),
                self._publisher.tick_us if self._publisher else 0,
            )

    def _land_once(self) -> int:
        landed = self._lander.step()
        if landed or not self._history.is_prepared:
            self._history.prepare()
        self.report()
        return landed

    def _run(self, one_round: Callable[[], int], rest: Callable[[float], object]) -> None:
        """rest: told for how many seconds rounds have found nothing."""
        came_s = time.monotonic()
        try:
            while not self._stopping.is_set():
                if one_round():
                    came_s = time.monotonic()
                else:
                    rest(time.monotonic() - came_s)
        except BaseException as failure:
            self.failure = failure
            self._tell_waiting()
            _LOG.exception("%s stopped", threading.current_thread().name)

    def _rest_of_feed(self, idle_s: float) -> None:
        settings = self._settings
        self._awaited.wait(settings.poll_seconds if idle_s < _IDLE_AFTER_S else settings.idle_poll_seconds)
        self._awaited.clear()

    def _rest_of_publisher(self, idle_s: float) -> None:
        self._ticked.wait(_PUBLISHER_RESTS_S)
        self._ticked.clear()

    @property
    def is_healthy(self) -> bool:
        return self.failure is None

    def stop(self, flush: bool = True) -> None:
        """Ends the threads, then lands what is left, if it lands at all. Raises what ended a thread early, if anything did."""
        self._stopping.set()
        self._awaited.set()
        self._ticked.set()
        for thread in self._threads:
            thread.join()
        self._threads = []
        if self.failure is not None:
            raise self.failure
        if self._only_reads:
            return
        if flush:
            self.flush()
        self.publish()
        self.report()

    def publish(self) -> bool:
        """Publishes the store if its tick is new; whether it did. A disk that is full makes the next start longer and leaves
        other processes at their tick, and stops nothing."""
        view = self.store.view()
        if self._publisher is None or view.tick_us in (0, self._publisher.tick_us):
            return False
        try:
            self._publisher.publish(view, self._origin)
        except OSError as error:
            _LOG.warning("tick %s was not published: %s", view.tick_us, error)
            return False
        return True

    def wait_until(self, position: tuple[int, ...], timeout_s: float = 10.0) -> bool:
        """Waits until the store has absorbed `position`; false if it has not by then."""

        def absorbed() -> bool:
            return all(own >= wanted for own, wanted in zip(self.store.position, position, strict=True))

        self._awaited.set()
        with self._moved:
            self._moved.wait_for(lambda: absorbed() or self.failure is not None, timeout_s)
        return absorbed()


def _told(progress: Progress | None, done: int, total: int) -> int:
    if progress:
        progress(done, total)
    return done
