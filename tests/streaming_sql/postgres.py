"""A throwaway PostgreSQL for tests: a data folder of its own, a Unix socket, no network."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest


def _binary(name: str) -> str:
    found = shutil.which(name)
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        found = found or shutil.which(name, path=str(folder))
    if found is None:
        pytest.skip(f"PostgreSQL is missing ({name}); on Debian: apt-get install postgresql")
    return found


@contextlib.contextmanager
def postgres(database: str) -> Iterator[psycopg.Connection]:
    """An autocommit connection to a fresh database, UTC and bytewise collation. Skips, by name, without PostgreSQL."""
    initdb, server = _binary("initdb"), _binary("pg_ctl")
    as_owner = []
    folder = Path(tempfile.mkdtemp(prefix="hr_pg_"))
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        as_owner = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
    data = folder / "data"
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off -c TimeZone=UTC"

    def run(*command: str) -> None:
        subprocess.run([*as_owner, *command], check=True, capture_output=True, cwd="/")

    try:
        run(initdb, "-D", str(data), "-U", "postgres", "-A", "trust", "--locale=C", "-E", "UTF8")
        run(server, "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            with psycopg.connect(host=str(folder), user="postgres", dbname="postgres", autocommit=True) as connection:
                connection.execute(f'create database "{database}"')
            with psycopg.connect(host=str(folder), user="postgres", dbname=database, autocommit=True) as connection:
                yield connection
        finally:
            run(server, "-D", str(data), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
