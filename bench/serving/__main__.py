"""Feeds a second and how late they are: `headrace serve` beside a plain FastAPI service, on a synthetic world over loopback.

    python -m bench.serving [--quick] [--world FOLDER] [--only ours|peer] [--workers 2] [--share 0.6] [--seconds 300] [--awake]
    python -m bench.serving --only ours --workers 2 --at 85 --seconds 61 --tick-every 30   # a steady rate, with two ticks

Each server runs alone, in processes of its own; arrivals come from another (`arrivals.py`). The capacity is searched first,
in steps of 40 s, as a server may put off what it writes for a while, and what it sustains is with that. What the search finds
is asked for once more for twice as long, less until it is held: that is the capacity. Then the latency is measured at a share
of it, for five minutes: ticks come every five, so one falls into each run. Ends by itself, usually within 25 minutes for each
server, the making of the world (once per folder) included.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from bench.serving.capacity import Latency, Load, measure, status_of, steady
from bench.serving.world import FULL, QUICK, SETTINGS_FILE, clock_setting, furnish, readers_of
from serving.awake import cores_awake
from warehouse.errors import HeadraceError
from warehouse.home import Home
from warehouse.time_algebra import FIVE_MINUTES_US, SECOND_US

PAGE = 20
STEP_S, QUICK_S = 40.0, 3.0
READY_WITHIN_S = 150.0
COMMANDS = {
    "ours": ["-c", "import sys; from headrace.cli import main; sys.exit(main())", "serve"],
    "peer": ["-m", "bench.serving.peer"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Feeds a second of this server and of a plain one.")
    parser.add_argument("--quick", action="store_true", help="a toy world and a second per step: does it run at all")
    parser.add_argument("--world", type=Path, help="folder of the world, kept; a temporary one by default")
    parser.add_argument("--only", choices=COMMANDS, help="one of the two servers")
    parser.add_argument("--workers", type=int, default=1, help="processes of either server (default %(default)s)")
    parser.add_argument("--share", type=float, default=0.6, help="of its capacity at which latency is measured")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="of the measurement (default %(default)g: one tick falls into it)"
    )
    parser.add_argument("--at", type=float, help="feeds a second: latency at this rate alone, no capacity is looked for")
    parser.add_argument(
        "--tick-every", type=float, help="seconds between two ticks: the clock runs so much faster; for a world of its own"
    )
    parser.add_argument("--awake", action="store_true", help="keep the cores from sleeping, for either server (Linux, root)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    if not 0 < arguments.share <= 1:
        parser.error(f"--share must be above 0 and at most 1, got {arguments.share}")
    if not 1 <= arguments.workers <= 64:
        parser.error(f"--workers must be 1 to 64, got {arguments.workers}")
    if not 1 <= arguments.seconds <= 600:
        parser.error(f"--seconds must be 1 to 600, got {arguments.seconds}")
    if arguments.at is not None and not 0 < arguments.at <= 10_000:
        parser.error(f"--at must be above 0 and at most 10000, got {arguments.at}")
    if arguments.tick_every is not None and not 1 <= arguments.tick_every <= 300:
        parser.error(f"--tick-every must be 1 to 300, got {arguments.tick_every}")
    if arguments.tick_every is not None and arguments.world is not None:
        parser.error("--tick-every takes the world's log ahead of the clock that it is served by later: leave --world out")
    size = QUICK if arguments.quick else FULL
    with contextlib.ExitStack() as stack:
        folder = arguments.world or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-bench-")))
        home = Home(folder)
        try:
            if arguments.awake:
                stack.enter_context(cores_awake())
            furnish(home, size)
        except (HeadraceError, ValueError) as error:
            parser.exit(2, f"{error}\n")
        step_s, measured_s = (QUICK_S, min(arguments.seconds, QUICK_S)) if arguments.quick else (STEP_S, arguments.seconds)
        load = Load(readers_of(size), PAGE, step_s, measured_s)
        result = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "load_average": os.getloadavg()[0],
            "workers": arguments.workers,
            "awake": arguments.awake,
            "notes": size.notes,
            "l1_top_k": size.l1_top_k,
            "history": size.history,
        }
        for name in COMMANDS:
            if arguments.only in (None, name):
                command = [*COMMANDS[name], "--workers", str(arguments.workers)]
                with _serving(command, home, arguments.workers, arguments.tick_every) as port:
                    if arguments.at is not None:
                        result[name] = asdict(steady(port, load, arguments.at))
                    else:
                        tell = functools.partial(_say, name)
                        result[name] = asdict(measure(port, load, arguments.share, tell))
                _write(arguments.json, result)
    if arguments.only is None and arguments.at is None:
        result["ratio"] = result["ours"]["capacity_per_s"] / result["peer"]["capacity_per_s"]
    print(as_text(result))
    _write(arguments.json, result)
    return 0


@contextlib.contextmanager
def _serving(command: list[str], home: Home, workers: int, tick_every_s: float | None) -> Iterator[int]:
    """A server in processes of its own, once all are ready; stopped at the end. RuntimeError if it ends early or does not
    become ready."""
    speed = "" if tick_every_s is None else f"@{FIVE_MINUTES_US / SECOND_US / tick_every_s:g}"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = {"HEADRACE_HOME": str(home.path), "HEADRACE_CLOCK": clock_setting(home) + speed}
    settings["HEADRACE_SERVING"] = str(home.path / SETTINGS_FILE)
    process = subprocess.Popen(
        [sys.executable, *command, "--port", str(port)],
        env=os.environ | settings,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + READY_WITHIN_S
        while not _is_ready(port, workers):
            if (status := process.poll()) is not None:
                raise RuntimeError(f"the server ended with status {status} before it was ready; what it logged above says why")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server did not become ready in {READY_WITHIN_S:.0f} s")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # workers that outlive it
            process.wait()


def _is_ready(port: int, workers: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/readyz", timeout=5):
            pass
        status = status_of(port)
        there = () if status is None else status.get("workers", ())
        return status is None or sum(worker["ready"] for worker in there) == (workers if workers > 1 else 0)
    except OSError:
        return False


def _write(path: Path | None, result: dict) -> None:
    """After each server, so that an error of the next one takes nothing away."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


def _say(name: str, line: str) -> None:
    print(f"{name}: {line}", file=sys.stderr, flush=True)


def as_text(result: dict) -> str:
    awake = ", cores kept awake" if result["awake"] else ""
    lines = [
        f"{result['machine']}, load average {result['load_average']:.1f} at the start; {result['notes']:,} notes, "
        f"{result['workers']} workers{awake}, L1 keeps {result['l1_top_k']}, pages of {PAGE}, histories of {result['history']}",
        "",
    ]
    table = [f"{'':6}{'feeds/s':>9}{'alone ms':>10}  medians per stage"]
    for name in COMMANDS:
        if (one := result.get(name)) is None:
            continue
        latency = Latency(**one.get("latency", one))
        lines.append(f"{name}: {latency.as_text()}")
        if "capacity_per_s" in one:
            stages = ", ".join(f"{stage} {value:.1f}" for stage, value in latency.stage_p50_ms.items())
            table.append(f"{name:6}{one['capacity_per_s']:9.1f}{one['unloaded_p50_ms']:10.1f}  {stages}")
    if len(table) > 1:
        lines += ["", *table]
    if "ratio" in result:
        lines.append(f"\ncapacity: {result['ratio']:.1f} times that of the plain service")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
