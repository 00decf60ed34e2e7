"""Runs dbt as a user does: a process of its own in the repository root, its state under the test's own home."""

import os
import subprocess
import sys
from pathlib import Path

from warehouse.home import REPOSITORY, Home


def dbt(home: Home, *words: str) -> str:
    """Runs `dbt WORDS` and returns what it printed. Raises AssertionError with the output if it fails."""
    finished = try_dbt(home, *words)
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def try_dbt(home: Home, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("dbt")), "--no-use-colors", *words],
        cwd=REPOSITORY,
        env={**os.environ, "HEADRACE_HOME": str(home.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
