"""`headrace stream run | status`: the embedded stream without a server, and where it stands."""

import argparse
import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from typing import Any

from streaming_sql.event_log import EventLog
from streaming_sql.lander import newest_landed_us
from streaming_sql.online_store import OnlineStore
from streaming_sql.runner import Progress, Runner
from streaming_sql.status import RUNNER_FILE, iso, stream_status
from warehouse.clock import Clock
from warehouse.errors import HeadraceError
from warehouse.features.declarations import load_groups
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import create_tables, landed_position

_EXAMPLES = """examples:
  headrace stream run              # until Ctrl-C: log -> store, log -> lake
  headrace stream run --once       # catch up, land everything, say where it stands, exit
  headrace stream status
  headrace stream status --json | jq .log.num_not_landed
"""


def main(words: list[str]) -> int:
    """Runs one `stream` command; returns the exit status."""
    arguments = _parser().parse_args(words[1:])
    home, clock = Home.from_env(), Clock.from_env()
    if arguments.command == "status":
        _print_status(stream_status(home, clock), arguments.json)
        return 0
    return _run(home, clock, arguments.once)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("headrace stream", description=__doc__, epilog=_EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the embedded stream", epilog=_EXAMPLES, formatter_class=raw)
    run.add_argument("--once", action="store_true", help="catch up with lake and log, land what is left, and exit")
    status = commands.add_parser("status", help="show positions, lag, tick and sizes", epilog=_EXAMPLES, formatter_class=raw)
    status.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def open_log(home: Home, lake: Lake, clock: Clock) -> EventLog:
    """The home's event log; a new one continues the lake's offsets and landing times."""
    create_tables(lake)
    start = landed_position(lake)
    return EventLog.open(home.log, len(start), clock, start, newest_landed_us(lake))


def _run(home: Home, clock: Clock, once: bool) -> int:
    groups = load_groups()
    lake = Lake.open(home)
    with contextlib.closing(open_log(home, lake, clock)) as log:
        store = OnlineStore.from_lake(lake, groups)
        runner = Runner(lake, log, store, groups, clock, status_path=home.online / RUNNER_FILE)
        with _progress("catching up") as progress:
            num_records = runner.catch_up(progress)
        view = store.view()
        print(
            f"caught up: {num_records} records replayed, tick {iso(view.tick_us)}, position {list(view.position)}", flush=True
        )
        if once:
            num_landed = runner.flush()
            runner.report()
            print(f"landed {num_landed} records; the lake is at {list(landed_position(lake))}")
            return 0
        return _until_stopped(runner, store)


def _until_stopped(runner: Runner, store: OnlineStore) -> int:
    stopping = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    runner.start()
    print("running; Ctrl-C stops", flush=True)
    tick_us = store.tick_us
    try:
        while not stopping.wait(0.5):
            if not runner.is_healthy:
                raise HeadraceError(f"the stream stopped: {runner.failure}")
            if store.tick_us != tick_us:
                tick_us = store.tick_us
                totals = runner.totals
                print(
                    f"tick {iso(tick_us)}  events {totals.num_events}  late {totals.num_late}  "
                    f"duplicates {totals.num_duplicates}  dead letters {totals.num_dead}",
                    flush=True,
                )
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, previous)
        if runner.is_healthy:
            runner.stop()
    print("stopped; everything acknowledged is in the log or the lake")
    return 0


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Progress]:
    from rich.progress import Progress as Bar

    with Bar(transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_status(status: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(status, indent=2))
        return
    print(f"clock    {status['clock']}")
    print(f"landed   {status['landed']}")
    if status["log"] is None:
        print("log      none yet; it is made by the first event or by `headrace stream run`")
    else:
        log = status["log"]
        print(f"log      ends at {log['end']}, {log['num_not_landed']} not landed, {log['bytes'] / 1e6:.1f} MB")
        print(f"         newest {', '.join(map(str, log['newest']))}; closes tick {log['closes_tick']}")
    runner = status["runner"]
    if runner is None:
        print("runner   has never reported")
        return
    state = f"process {runner['pid']}" if runner["is_running"] else "not running"
    print(f"runner   {state}, last heard {runner['updated_at']}: tick {runner['tick']}, {runner['num_behind']} records behind")
    print(
        f"         events {runner['num_events']}, late {runner['num_late']}, duplicates {runner['num_duplicates']}, "
        f"dead letters {runner['num_dead']}; blocks {runner['block_bytes'] / 1e6:.1f} MB"
    )
