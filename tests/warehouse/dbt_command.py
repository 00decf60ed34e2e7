"""Runs dbt as a user does: a process of its own in the repository root, its state under the test's own home."""

import os
import subprocess
from pathlib import Path

from tests import forked
from warehouse.home import REPOSITORY, Home


def dbt(home: Home, *words: str, project: Path = REPOSITORY) -> str:
    """Runs `dbt WORDS` and returns what it printed. Raises AssertionError with the output if it fails."""
    finished = try_dbt(home, *words, project=project)
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def try_dbt(home: Home, *words: str, project: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `dbt WORDS` in a project folder whose Python is the project's own; `stdout` is all that it printed."""
    environment = {**os.environ, "HEADRACE_HOME": str(home.path), "PYTHONPATH": str(project), **environment}
    code = "from dbt.cli.main import cli; cli()"
    finished = forked.python(code, "--no-use-colors", *words, cwd=project, environment=environment)
    finished.stdout += finished.stderr
    return finished
