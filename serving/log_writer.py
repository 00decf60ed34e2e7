"""The process that writes the forward log, and the end of it that a server holds.

Encoding Parquet and committing is half a second of work every ten seconds. Beside requests it would hold their interpreter and
their core; in a process of its own, at a low priority, it takes what they leave.

Rows are sent as they are made, so that what a write sends is little: tens of megabytes at once would take from requests what
the process was made to leave them. Each write has the number of its batch, and is answered by a line. Whichever side dies, the
other sees the pipe's end. A batch is written whole or not at all, and one that is sent again under its number is written once.
"""

import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import pyarrow as pa

from serving.forward_log import FORWARD_LOG_SCHEMA, write_once
from warehouse.home import Home
from warehouse.lake import Lake

_ROWS, _FORGET, _WRITE = b"R", b"F", b"W"
"""Kinds of messages: rows (their size and an Arrow record batch), forget all rows so far, write them (the batch's number)."""
_SIZE = struct.Struct(">Q")
_DONE = b"written\n"
_NICE = 10
"""Not lower: it holds the catalogue's lock at times, for which others wait."""
_ENDS_WITHIN_S = 30.0
_PIPE_BYTES = 1 << 20


class LogWriter:
    """Starts the process at the first rows, and again at the next ones after it died. For one thread."""

    def __init__(self, home: Home, lock: Path):
        self._command = [sys.executable, "-m", "serving.log_writer", str(home.path), str(lock)]
        self._process: subprocess.Popen[bytes] | None = None
        self._sent: list[pa.Table] = []
        """What the process holds, to be written."""

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def send_ahead(self, rows: pa.Table) -> None:
        """Sends rows of the next `write`. If that fails the write sends them again."""
        try:
            self._send(rows)
            self._pipe().flush()
        except OSError:
            self.close()

    def write(self, tables: Sequence[pa.Table], batch: uuid.UUID) -> None:
        """Returns once the rows are in the lake. Raises OSError if they could not be written, or nobody can say whether."""
        try:
            if len(self._sent) > len(tables) or any(sent is not table for sent, table in zip(self._sent, tables, strict=False)):
                self._pipe().write(_FORGET)
                self._sent = []
            for table in tables[len(self._sent) :]:
                self._send(table)
            self._sent = []
            self._pipe().write(_WRITE + batch.bytes)
            self._pipe().flush()
            assert self._process is not None
            assert self._process.stdout is not None
            answer = self._process.stdout.readline()
        except OSError:
            answer = b""
        if not answer:
            self.close()
            raise OSError("the process that writes the forward log has ended; another is started")
        if answer != _DONE:
            raise OSError(answer.decode().strip())

    def close(self) -> None:
        """Ends the process, once it has written what it was told to."""
        process, self._process, self._sent = self._process, None, []
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def _send(self, rows: pa.Table) -> None:
        pipe = self._pipe()
        for part in rows.to_batches():
            message = part.serialize()
            pipe.write(_ROWS + _SIZE.pack(message.size))
            pipe.write(message)
        self._sent.append(rows)

    def _pipe(self) -> IO[bytes]:
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        return process.stdin

    def _started(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        with contextlib.suppress(OSError, AttributeError):  # more than the system lets one have, or not Linux
            fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        return process


def main() -> None:
    """Writes what comes on stdin until its end. Arguments: the home, the lock."""
    os.nice(_NICE)
    for stop in (signal.SIGINT, signal.SIGTERM):  # a terminal sends it to all; the server ends this by closing the pipe
        signal.signal(stop, signal.SIG_IGN)
    home, lock = Home(Path(sys.argv[1])), Path(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a library that prints must not answer
    lake = Lake.open(home)
    with contextlib.suppress(BrokenPipeError):  # the server was killed; what it had sent is written
        for batch, table in batches(sys.stdin.buffer):
            try:
                write_once(lake, table, batch, lock)
                answer = _DONE
            except Exception as error:
                answer = " ".join(f"{type(error).__name__}: {error}".split()).encode() + b"\n"
            answers.write(answer)
            del table
            pa.default_memory_pool().release_unused()  # a batch is as large as all else together


def batches(source: IO[bytes]) -> Iterator[tuple[uuid.UUID, pa.Table]]:
    """What is to be written, each batch with its number, until the source ends."""
    parts: list[pa.RecordBatch] = []
    with contextlib.suppress(EOFError):
        while True:
            kind = _exactly(source, 1)
            if kind == _ROWS:
                (size,) = _SIZE.unpack(_exactly(source, _SIZE.size))
                parts.append(pa.ipc.read_record_batch(pa.py_buffer(_exactly(source, size)), FORWARD_LOG_SCHEMA))
            elif kind == _FORGET:
                parts.clear()
            elif kind == _WRITE:
                yield uuid.UUID(bytes=_exactly(source, 16)), pa.Table.from_batches(_taken(parts), FORWARD_LOG_SCHEMA)
            else:
                raise ValueError(f"no message starts with {kind!r}")


def _taken(parts: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
    taken = list(parts)
    parts.clear()
    return taken


def _exactly(source: IO[bytes], size: int) -> bytes:
    """Raises EOFError at the end, and where it comes too early, as of a server that was killed while it sent."""
    found = source.read(size)
    if len(found) < size:
        raise EOFError
    return found


if __name__ == "__main__":
    main()
