"""`headrace stream run | status`: the embedded stream without a server, and where it stands."""

import argparse
import contextlib
import json
import signal
import threading
from collections.abc import Iterator

from streaming_sql.online_store import OnlineStore
from streaming_sql.open_log import open_log
from streaming_sql.pauses import settle
from streaming_sql.published import Publisher
from streaming_sql.restore import STORE_FOLDER, open_store
from streaming_sql.runner import Progress, Runner
from streaming_sql.runner_report import RUNNER_FILE, iso
from streaming_sql.settings import StreamSettings
from streaming_sql.status import stream_status
from streaming_sql.status_view import status_lines, watch
from warehouse.clock import Clock
from warehouse.errors import HeadraceError
from warehouse.features.declarations import load_groups
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import landed_position

_EXAMPLES = """examples:
  headrace stream run              # until Ctrl-C: log -> store, log -> lake
  headrace stream run --once       # catch up, land everything, say where it stands, exit
  headrace stream status
  headrace stream status --watch   # lag, watermark, positions, late counts, throughput; Ctrl-C ends it
  headrace stream status --json | jq .log.num_not_landed
"""


def main(words: list[str]) -> int:
    """Runs one `stream` command; returns the exit status."""
    arguments = _parser().parse_args(words[1:])
    home, clock = Home.from_env(), Clock.from_env()
    settings = StreamSettings.from_env()
    if arguments.command == "run":
        return _run(home, clock, settings, arguments.once)
    if arguments.watch:
        watch(home, clock, settings, arguments.every)
    elif arguments.json:
        print(json.dumps(stream_status(home, clock, settings), indent=2))
    else:
        print("\n".join(status_lines(stream_status(home, clock, settings))))
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("headrace stream", description=__doc__, epilog=_EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the embedded stream", epilog=_EXAMPLES, formatter_class=raw)
    run.add_argument("--once", action="store_true", help="catch up with lake and log, land what is left, and exit")
    status = commands.add_parser("status", help="show positions, lag, tick and sizes", epilog=_EXAMPLES, formatter_class=raw)
    how = status.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print one JSON object")
    how.add_argument("--watch", action="store_true", help="show it again and again, with rates, until Ctrl-C")
    status.add_argument("--every", type=_seconds, default=1.0, metavar="SECONDS", help="of --watch (default %(default)s)")
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"must be between 0.1 and 3600 seconds, got {text}")
    return seconds


def _run(home: Home, clock: Clock, settings: StreamSettings, once: bool) -> int:
    groups = load_groups()
    lake = Lake.open(home)
    with contextlib.closing(open_log(home, lake, clock, settings)) as log:
        folder = home.online / STORE_FOLDER
        store, publisher = open_store(folder, lake, log, groups), Publisher(folder, groups)
        runner = Runner(lake, log, store, groups, clock, settings.runner(), home.online / RUNNER_FILE, publisher=publisher)
        with _progress("catching up") as progress:
            num_records = runner.catch_up(progress)
        view = store.view()
        print(
            f"caught up: {num_records} records replayed, tick {iso(view.tick_us)}, position {list(view.position)}", flush=True
        )
        if once:
            num_landed = runner.flush()
            runner.publish()
            runner.report()
            print(f"landed {num_landed} records; the lake is at {list(landed_position(lake))}")
            return 0
        return _until_stopped(runner, store)


def _until_stopped(runner: Runner, store: OnlineStore) -> int:
    stopping = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    settle()
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
