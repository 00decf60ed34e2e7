"""A command that is told to stop while a process that it started works."""

import os
import subprocess
import sys
import time
from pathlib import Path

from warehouse.home import REPOSITORY


def leaves_nothing_behind(home: Path, *words: str) -> None:
    """Runs `headrace WORDS`, sends SIGTERM once it has a child, and asserts how both end."""
    command = [sys.executable, "-m", "headrace.cli", *words]
    running = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "HEADRACE_HOME": str(home)})
    children, deadline = Path(f"/proc/{running.pid}/task/{running.pid}/children"), time.monotonic() + 60
    while not (child := children.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.terminate()
    assert running.wait(timeout=60) == 143
    assert not Path(f"/proc/{child}").exists()
