"""Processes that a command starts, and that end with it."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from warehouse.home import REPOSITORY

_SECONDS_TO_END = 60


def exit_when_told() -> None:
    """From now on SIGTERM ends this process as an exit does, so that what it started ends, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def started(command: list[str], environment: Mapping[str, str] | None = None, **more: Any) -> Iterator[subprocess.Popen]:
    """A process in the repository's root that ends with the block, however the block ends. more: for Popen."""
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, **more) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
