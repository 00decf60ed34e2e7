"""A throwaway PostgreSQL for tests: a data folder of its own, a Unix socket, no network."""

import contextlib
import os
import shutil
import signal
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


class Server:
    """One database of a server that can be killed and started again."""

    def __init__(self, folder: Path, database: str):
        self._folder, self._data = folder, folder / "data"
        self.dsn = f"host={folder} user=postgres dbname={database}"
        self._as_owner: list[str] = []
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            self._as_owner = ["runuser", "-u", "postgres", "--"]
            shutil.chown(folder, "postgres")

    @classmethod
    @contextlib.contextmanager
    def started(cls, database: str) -> Iterator["Server"]:
        """UTC and bytewise collation. Skips, by name, without PostgreSQL."""
        initdb = _binary("initdb")
        folder = Path(tempfile.mkdtemp(prefix="hr_pg_"))
        server = cls(folder, database)
        try:
            server._run(initdb, "-D", str(server._data), "-U", "postgres", "-A", "trust", "--locale=C", "-E", "UTF8")
            server.start()
            try:
                with psycopg.connect(host=str(folder), user="postgres", dbname="postgres", autocommit=True) as connection:
                    connection.execute(f'create database "{database}"')
                yield server
            finally:
                server.kill()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def start(self) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories={self._folder} -c fsync=off -c TimeZone=UTC"
        self._run(_binary("pg_ctl"), "-D", str(self._data), "-w", "-l", str(self._folder / "log"), "-o", options, "start")

    def kill(self) -> None:
        """Ends it as a crash does: no connection is told."""
        self._run(_binary("pg_ctl"), "-D", str(self._data), "-m", "immediate", "stop")

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """Meanwhile no process of it runs: connections stay open, and nothing is answered."""
        parent = int((self._data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        stopped = [parent, *map(int, children)]
        for process in stopped:
            os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in stopped:
                os.kill(process, signal.SIGCONT)

    def connected(self) -> psycopg.Connection:
        return psycopg.connect(self.dsn, autocommit=True)

    def _run(self, *command: str) -> None:
        subprocess.run([*self._as_owner, *command], check=True, capture_output=True, cwd="/")


@contextlib.contextmanager
def postgres(database: str) -> Iterator[psycopg.Connection]:
    """An autocommit connection to a fresh database. Skips, by name, without PostgreSQL."""
    with Server.started(database) as server, server.connected() as connection:
        yield connection
