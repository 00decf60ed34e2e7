"""`headrace serve` and `headrace parity`."""

import argparse
import json
import os
import socket
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from serving.awake import cores_awake
from serving.cores import WORKERS
from serving.logs import FORMATS, configure
from warehouse.clock import Clock
from warehouse.errors import HeadraceError
from warehouse.home import Home
from warehouse.loading import loading

DIFFERS, DONE = 1, 0
GRACEFUL_SHUTDOWN_S = 10
MOST_WORKERS = 64
LOG_FORMAT, ACCESS_LOG = "HEADRACE_LOG_FORMAT", "HEADRACE_ACCESS_LOG"
"""How a worker of several is told of the options of its parent."""


def main(words: list[str]) -> int:
    """words: the command and its arguments. Returns the exit status; HeadraceError is the dispatcher's to print."""
    return {"serve": _serve, "parity": _parity}[words[0]](words[1:])


def _serve(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="headrace serve", description="Run the HTTP server on this home until it is stopped.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes, one per core at most (default %(default)s)")
    parser.add_argument(
        "--any-core",
        action="store_true",
        help="workers run on any core; by default each keeps to its share of them, as is best on a machine of their own",
    )
    parser.add_argument("--log-format", choices=FORMATS, default="text", help="of the lines on stderr (default %(default)s)")
    parser.add_argument(
        "--access-log", action="store_true", help="also a line per answer: request id, route, status, milliseconds"
    )
    parser.add_argument(
        "--awake",
        action="store_true",
        help="the machine's cores do not sleep between requests: shorter waits, more power (Linux, root)",
    )
    arguments = parser.parse_args(words)
    if not 1 <= arguments.port <= 65535:
        raise HeadraceError(f"--port must be between 1 and 65535, got {arguments.port}")
    if not 1 <= arguments.workers <= MOST_WORKERS:
        raise HeadraceError(f"--workers must be between 1 and {MOST_WORKERS}, got {arguments.workers}")
    _check_port(arguments.host, arguments.port)
    with cores_awake() if arguments.awake else nullcontext():
        return _serve_until_stopped(arguments)


def _serve_until_stopped(arguments: argparse.Namespace) -> int:
    with loading():
        import uvicorn

        from serving.app import create_app
        from serving.engine import missing_parts
        from serving.settings import Settings

    home, settings = Home.from_env(), Settings.from_env()
    if missing := missing_parts(home):
        raise HeadraceError("cannot serve yet:\n  " + "\n  ".join(missing))
    if arguments.workers > 1:
        return _serve_with_workers(arguments)
    configure(arguments.log_format, arguments.access_log)
    failures: list[str] = []

    def stop(missing: list[str]) -> None:
        failures.extend(missing)
        server.should_exit = True

    app = create_app(home, settings=settings, on_failure=stop)
    config = uvicorn.Config(
        app,
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_S,
    )
    server = uvicorn.Server(config)
    _announce(arguments)
    server.run()
    if failures:
        raise HeadraceError("\n  ".join(failures))
    return DONE


def _serve_with_workers(arguments: argparse.Namespace) -> int:
    """Several processes behind one socket, as `uvicorn serving.app:app --workers N`; one that dies is started again."""
    import uvicorn
    from uvicorn.config import STARTUP_FAILURE
    from uvicorn.supervisors import Multiprocess

    Clock.share()
    os.environ.pop(WORKERS, None)
    if not arguments.any_core:
        os.environ[WORKERS] = str(arguments.workers)
    os.environ[LOG_FORMAT], os.environ[ACCESS_LOG] = arguments.log_format, "1" if arguments.access_log else ""
    config = uvicorn.Config(
        "serving.cli:app_of_worker",
        factory=True,
        workers=arguments.workers,
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_S,
    )
    # a socket for each, among which the kernel spreads connections; of one that they share, whoever wakes first takes them all
    own: Any = _OwnSocket(arguments.host, arguments.port)
    supervisor = Multiprocess(config, [own if sys.platform == "linux" else config.bind_socket()])
    _announce(arguments)
    supervisor.run()
    if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
        raise HeadraceError("a worker could not start; what it logged above says why")
    return DONE


@dataclass(frozen=True)
class _OwnSocket:
    """Becomes a socket, bound and not yet listening, in the process that it is sent to."""

    host: str
    port: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _bound, (self.host, self.port)


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(address)
    return made


def app_of_worker() -> Any:
    """The app of one of several processes, which logs as its parent was told to."""
    with loading():
        from serving.app import create_app
        from serving.settings import Settings

    configure(os.environ.get(LOG_FORMAT, FORMATS[0]), bool(os.environ.get(ACCESS_LOG)))
    return create_app(settings=Settings.from_env())


def _announce(arguments: argparse.Namespace) -> None:
    print(f"headrace: open http://{arguments.host}:{arguments.port}/ui (API: /docs, state: /readyz)", flush=True)


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise HeadraceError(f"cannot listen on {host}:{port}: {why}; choose another with --host or --port") from None


def _parity(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="headrace parity",
        description="Compute every served feature value again from the lake and compare. Exit 1 on a difference.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--min", type=int, default=1, metavar="N", help="also fail when fewer than N vectors were compared")
    parser.add_argument("--last", type=int, default=None, metavar="N", help="only the newest N requests")
    arguments = parser.parse_args(words)
    for name in ("min", "last"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise HeadraceError(f"--{name} must be at least 1, got {value}")

    from serving.parity import check_parity
    from warehouse.lake import Lake

    parity = check_parity(Lake.open(Home.from_env()), arguments.last)
    print(json.dumps(parity.as_dict()) if arguments.json else parity.as_text())
    if parity.num_vectors < arguments.min:
        print(f"compared {parity.num_vectors} vectors, --min asks for {arguments.min}", file=sys.stderr)
        return DIFFERS
    return DONE if parity.agrees else DIFFERS
