"""Processes that a command starts, and that end with it. For the main thread, which signals reach."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from warehouse.home import REPOSITORY

_SECONDS_TO_END = 60


def exit_when_told() -> None:
    """From now on SIGTERM ends this process as an exit does, so that what it started ends, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def started(command: list[str], environment: Mapping[str, str] | None = None, **more: Any) -> Iterator[subprocess.Popen]:
    """A process in the repository's root that ends with the block, however the block ends. more: for Popen."""
    with ExitStack() as to_end:
        with _told_later():  # else SIGTERM could leave a process that nobody knows
            process = to_end.enter_context(subprocess.Popen(command, cwd=REPOSITORY, env=environment, **more))
            to_end.callback(_end, process)
        yield process


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()


@contextmanager
def _told_later() -> Iterator[None]:
    """SIGTERM within the block is heard at its end."""
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if told:
            signal.raise_signal(signal.SIGTERM)
