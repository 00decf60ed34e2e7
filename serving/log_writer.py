"""The process that writes the forward log, and the end of it that a server holds.

Encoding Parquet and committing is half a second of work every ten seconds. Beside requests it would hold their interpreter and
their core; in a process of its own, at a low priority, it takes what they leave.

A message is the number of a batch and Arrow record batches, the answer to it a line. Whichever side dies, the other sees the
pipe's end. What was sent is written whole or not at all, and what is sent again under its number is written once.
"""

import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa

from serving.forward_log import FORWARD_LOG_SCHEMA, write_once
from warehouse.home import Home
from warehouse.lake import Lake

_HEAD, _PART = struct.Struct(">16sI"), struct.Struct(">Q")
_DONE = b"written\n"
_NICE = 10
_ENDS_WITHIN_S = 30.0
_PIPE_BYTES = 1 << 20


class LogWriter:
    """Starts the process at the first write, and again at the next one after it died. For one thread."""

    def __init__(self, home: Home, lock: Path):
        self._command = [sys.executable, "-m", "serving.log_writer", str(home.path), str(lock)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def write(self, table: pa.Table, batch: uuid.UUID) -> None:
        """Returns once the rows are in the lake. Raises OSError if they could not be written, or nobody can say whether."""
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            parts = table.to_batches()
            process.stdin.write(_HEAD.pack(batch.bytes, len(parts)))
            for part in parts:
                message = part.serialize()
                process.stdin.write(_PART.pack(message.size))
                process.stdin.write(message)
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = b""
        if not answer:
            self.close()
            raise OSError("the process that writes the forward log has ended; another is started")
        if answer != _DONE:
            raise OSError(answer.decode().strip())

    def close(self) -> None:
        """Ends the process, once it has written what it was given."""
        process, self._process = self._process, None
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
        for batch, table in messages(sys.stdin.buffer):
            try:
                write_once(lake, table, batch, lock)
                answer = _DONE
            except Exception as error:
                answer = " ".join(f"{type(error).__name__}: {error}".split()).encode() + b"\n"
            answers.write(answer)
            del table
            pa.default_memory_pool().release_unused()  # a batch is as large as all else together


def messages(source: IO[bytes]) -> Iterator[tuple[uuid.UUID, pa.Table]]:
    """The batches that come, each with its number, until the source ends."""
    with contextlib.suppress(EOFError):
        while True:
            batch, num_parts = _HEAD.unpack(_exactly(source, _HEAD.size))
            yield uuid.UUID(bytes=batch), pa.Table.from_batches([_part(source) for _ in range(num_parts)], FORWARD_LOG_SCHEMA)


def _part(source: IO[bytes]) -> pa.RecordBatch:
    (size,) = _PART.unpack(_exactly(source, _PART.size))
    return pa.ipc.read_record_batch(pa.py_buffer(_exactly(source, size)), FORWARD_LOG_SCHEMA)


def _exactly(source: IO[bytes], size: int) -> bytes:
    """Raises EOFError at the end, and where it comes too early, as of a server that was killed while it sent."""
    found = source.read(size)
    if len(found) < size:
        raise EOFError
    return found


if __name__ == "__main__":
    main()
