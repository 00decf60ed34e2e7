"""The process that writes the forward log, and the end of it that a server holds.

Encoding Parquet is a second of work every ten seconds. Beside requests it would hold their interpreter and their core; in a
process of its own, at a low priority, it takes what they leave, and gives it up at once (`idle_time.py`). Rows are encoded some
at a time, as they come, into one file: all at once they take every core's rest for a second or two, and a machine that is one
of several guests of a host was halted then, 10 to 35 ms with all its cores, some times over (docs/LOG.md).

What is sent is a stream of Arrow record batches, in which a list of texts goes once however many rows are made of it. Rows go
as they are made, so that what a write sends is little: tens of megabytes at once would take from requests what the process was
made to leave them. Each write has the number of its batch, and is answered by a line. Whichever side dies, the other sees the
pipe's end. A batch is written whole or not at all, and one that is sent again under its number is written once.
"""

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import pyarrow as pa
from pyiceberg.manifest import DataFile

from serving.forward_log import CODED_SCHEMA, FORWARD_LOG, commit_once
from serving.idle_time import Result, in_idle_time
from streaming_sql.pauses import settle
from warehouse.file_writer import FileWriter
from warehouse.home import Home
from warehouse.lake import Lake

log = logging.getLogger(__name__)

_FORGET, _WRITE = b"forget", b"write"
"""What a record batch without rows says of those so far: to forget them, or to write them under this number."""
_DONE = b"written\n"
_NICE = 10
"""Not lower: it holds the catalogue's lock at times, for which others wait."""
ENCODED_AT_ONCE = 128
"""Rows; a quarter of a second. Fewer take more in all: with 32 the writers could not keep up at 150 feeds/s."""
_IDLY_FOR_S = 2.0
"""These rows may take this long in idle time, the end of a file and its commit as long again. Where rows took longer the next
are not left to it: more come, and the queue has an end."""
_ENDS_WITHIN_S = 30.0
_PIPE_BYTES = 1 << 20


class LogWriter:
    """Starts the process at the first rows, and again at the next ones after it died; it may run on the cores that were allowed
    when this was made. For one thread."""

    def __init__(self, home: Home, lock: Path):
        self._command = [sys.executable, "-m", "serving.log_writer", str(home.path), str(lock)]
        self._cores: set[int] = os.sched_getaffinity(0) if sys.platform == "linux" else set()
        self._process: subprocess.Popen[bytes] | None = None
        self._stream: pa.RecordBatchStreamWriter | None = None
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
                self._say({_FORGET: b""}, self._sent[-1])
                self._sent = []
            for table in tables[len(self._sent) :]:
                self._send(table)
            self._sent = []
            self._say({_WRITE: batch.bytes}, tables[-1])
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
        process, self._process, self._stream, self._sent = self._process, None, None, []
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
        for part in rows.to_batches():
            self._opened().write_batch(part)
        self._sent.append(rows)

    def _say(self, what: dict[bytes, bytes], beside: pa.Table) -> None:
        """beside: rows whose lists of texts the stream knows, so that none is sent."""
        self._opened().write_batch(beside.to_batches()[-1].slice(0, 0), custom_metadata=what)

    def _opened(self) -> pa.RecordBatchStreamWriter:
        stream = self._stream = self._stream or pa.ipc.new_stream(self._pipe(), CODED_SCHEMA)
        return stream

    def _pipe(self) -> IO[bytes]:
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        return process.stdin

    def _started(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        with contextlib.suppress(OSError, AttributeError):  # more than the system lets one have, or not Linux
            os.sched_setaffinity(process.pid, self._cores)
            fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        return process


def main() -> None:
    """Writes what comes on stdin until its end. Arguments: the home, the lock."""
    os.nice(_NICE)
    for stop in (signal.SIGINT, signal.SIGTERM):  # a terminal sends it to all; the server ends this by closing the pipe
        signal.signal(stop, signal.SIG_IGN)
    home, lock = Home(Path(sys.argv[1])), Path(sys.argv[2])
    settle()
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a library that prints must not answer
    with contextlib.suppress(BrokenPipeError):  # the server was killed; what it had sent is written
        for answer in written(sys.stdin.buffer, Lake.open(home), lock):
            answers.write(answer)


def written(source: IO[bytes], lake: Lake, lock: Path) -> Iterator[bytes]:
    """Writes each batch that comes, and gives the answer to it, until the source ends or, its server killed, breaks off."""
    batch = _Batch(lake)
    try:
        for part, said in _received(source):
            if said is None:
                batch.take(part)
            elif _FORGET in said:
                batch.forget()
            else:
                try:
                    commit = partial(commit_once, lake, batch.files(), uuid.UUID(bytes=said[_WRITE]), lock)
                    batch.idly(commit)
                    yield _DONE
                except Exception as error:
                    yield " ".join(f"{type(error).__name__}: {error}".split()).encode() + b"\n"
    finally:
        batch.forget()


class _Batch:
    """What has come of the next batch, most of it encoded."""

    def __init__(self, lake: Lake):
        self._lake, self._is_behind = lake, False
        self._parts: list[pa.RecordBatch] = []
        self._writer: FileWriter | None = None
        self._failed: Exception | None = None

    def take(self, part: pa.RecordBatch) -> None:
        self._parts.append(part)
        if sum(one.num_rows for one in self._parts) >= ENCODED_AT_ONCE:
            self._encode()

    def files(self) -> list[DataFile]:
        """Of all that came, which is forgotten then. Raises what went wrong with any of it: all of it must come again."""
        try:
            self._encode()
            if self._failed is not None:
                raise self._failed
            files = [] if self._writer is None else self.idly(self._writer.close)
            self._writer = None
            return files
        finally:
            self.forget()

    def forget(self) -> None:
        if self._writer is not None:
            self._writer.discard()
        self._writer, self._failed = None, None
        self._parts.clear()

    def idly(self, work: Callable[[], Result]) -> Result:
        """What the work gives, in time that nobody else wants unless rows are behind."""
        return work() if self._is_behind else in_idle_time(work, _IDLY_FOR_S)

    def _encode(self) -> None:
        if not self._parts or self._failed is not None:
            self._parts.clear()
            return
        rows = pa.Table.from_batches(self._parts, CODED_SCHEMA)
        self._parts.clear()
        started = time.monotonic()
        try:
            writer = self._writer = self._writer or self._lake.file_writer(FORWARD_LOG)
            self.idly(lambda: writer.write(rows))
        except Exception as error:
            self._failed = error
        self._is_behind = not self._is_behind and time.monotonic() - started > _IDLY_FOR_S


def _received(source: IO[bytes]) -> Iterator[tuple[pa.RecordBatch, pa.KeyValueMetadata | None]]:
    try:
        stream = pa.ipc.open_stream(source)
        while True:
            yield stream.read_next_batch_with_custom_metadata()
    except StopIteration:
        return
    except (pa.ArrowInvalid, OSError) as error:
        log.warning("forward log: what the server sends ended early: %s", error)


if __name__ == "__main__":
    main()
