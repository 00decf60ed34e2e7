"""Command lines in processes of their own, forked from one that has imported what they all import and done nothing else.

Importing dbt takes seconds of processor time, and a test run gives dozens of its commands. A test process has one such server
for all that it forks, so what is imported ahead is named here alone. A command forgets what is the project's of it, so that in
a copy of the project it runs the copy's own Python.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

_IMPORTED = ["dbt.cli.main", "dbt.adapters.duckdb", "duckdb", "pyarrow.parquet", "pyiceberg.catalog.sql", "sqlglot"]
_ROOMS = ("headrace", "bench", "serving", "models_ml", "streaming_sql", "warehouse", "kernels")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(_IMPORTED)


def import_ahead(*modules: str) -> None:
    """For the processes that come from `FORKS`, if none has been started yet."""
    _IMPORTED.extend(module for module in modules if module not in _IMPORTED)
    FORKS.set_forkserver_preload(_IMPORTED)


def started(
    code: str, *words: str, cwd: Path, environment: Mapping[str, str], printed: tuple[str, str] = (os.devnull, os.devnull)
):
    """`python -c CODE WORDS`, running. printed: the files that its two outputs are added to."""
    process = FORKS.Process(target=_run, args=(code, words, str(cwd), dict(environment), printed))
    process.start()
    return process


def python(
    code: str, *words: str, cwd: Path, environment: Mapping[str, str], timeout_s: float = 280
) -> subprocess.CompletedProcess[str]:
    """`python -c CODE WORDS`. Raises TimeoutError if it takes longer; it does not live on then."""
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        process = started(code, *words, cwd=cwd, environment=environment, printed=(out.name, err.name))
        process.join(timeout_s)
        status = process.exitcode
        if status is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{' '.join(words)} still ran after {timeout_s} s: {out.read()}{err.read()}")
        process.close()
        return subprocess.CompletedProcess(words, status, out.read(), err.read())


def _run(code: str, words: tuple[str, ...], cwd: str, environment: dict[str, str], printed: tuple[str, str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in _ROOMS]:
        del sys.modules[name]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv = ["-c", *words]
    for stream, path in zip((1, 2), printed, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
