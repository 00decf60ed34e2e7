"""Kills this process at its n-th write boundary: before a SQL statement that writes (event log and catalogue alike, so a
commit is hit before it, and after it by the next statement), before and after a file of the lake is made, and before and after
a file of the published store takes its name."""

import os
import pathlib
import signal
import sqlite3

WRITES = ("begin", "insert", "update", "delete", "replace", "create", "commit", "rollback")


class CrashPoints:
    """Counts boundaries; ends the process at number `at` (0: never)."""

    def __init__(self, at: int):
        self.at, self.num = at, 0

    def reach(self) -> None:
        self.num += 1
        if self.num == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def install(at: int) -> CrashPoints:
    """Watches every SQLite connection and lake file that this process opens from now on."""
    points = CrashPoints(at)

    def traced(statement: str) -> None:
        if statement.lstrip().lower().startswith(WRITES):
            points.reach()

    connect = sqlite3.connect

    def watched(*arguments, **keywords):
        connection = connect(*arguments, **keywords)
        connection.set_trace_callback(traced)
        return connection

    sqlite3.connect = sqlite3.dbapi2.connect = watched
    from pyiceberg.io.pyarrow import PyArrowFile

    make = PyArrowFile.create

    def create(self, overwrite=False):
        points.reach()
        stream = make(self, overwrite)
        points.reach()
        return stream

    PyArrowFile.create = create
    rename = pathlib.Path.replace

    def replace(self, target):
        points.reach()
        found = rename(self, target)
        points.reach()
        return found

    pathlib.Path.replace = replace
    return points
