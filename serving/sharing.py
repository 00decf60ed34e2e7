"""Feeds that would wait in one worker are computed by another that has less to do.

A connection stays with its worker, and connections are never spread so evenly, nor requests so regularly, that no worker has a
line while another rests. Each says in a mapped file how many requests it has; one that has a line hands what comes next, as it
came, to whoever has least, over a Unix socket, and passes the answer on. What was handed on is not handed on again. Knows
nothing of what a request is.
"""

import asyncio
import contextlib
import logging
import mmap
import struct
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path

from serving.seat import MOST_WORKERS

log = logging.getLogger(__name__)

_LOADS = "loads"
_SIZE = struct.Struct(">I")
MOST_S = 20.0
"""One that takes longer to answer hangs."""
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Sharing:
    """One worker's part in it. For its event loop alone."""

    def __init__(self, folder: Path, number: int, compute: Callable[[bytes], Awaitable[bytes]]):
        """folder: one that only this user may enter, the same for all workers. compute: answers a request of another worker;
        where it gives nothing, or raises, the other computes for itself."""
        self._folder, self._number, self._compute = folder, number, compute
        self._idle: dict[int, list[Connection]] = defaultdict(list)
        self._handed: dict[int, int] = defaultdict(int)
        self._hearing: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._loads = memoryview(bytearray(MOST_WORKERS * 4)).cast("i")

    async def listen(self) -> None:
        with open(self._folder / _LOADS, "a+b") as file:
            file.truncate(self._loads.nbytes)
            self._loads = memoryview(mmap.mmap(file.fileno(), 0)).cast("i")
        self._path(self._number).unlink(missing_ok=True)  # of a worker with this number that was killed
        self._server = await asyncio.start_unix_server(self._hear, self._path(self._number))
        self.tell(0)

    async def close(self) -> None:
        self._loads[self._number] = 0
        if self._server is not None:
            self._server.close()
            self._path(self._number).unlink(missing_ok=True)
        for _, writer in [one for some in self._idle.values() for one in some]:
            writer.close()
        for writer in self._hearing:
            writer.close()

    def tell(self, load: int) -> None:
        """load: how many requests this worker computes or has waiting, its own and others'."""
        self._loads[self._number] = load + 1  # 0 is of a worker that is not there

    def less_busy(self, load: int) -> int | None:
        """The number of the worker that has least to do, if that is less than `load`."""
        least, found = load, None
        for number, said in enumerate(self._loads.tolist()):
            if said and number != self._number and (has := max(said - 1, self._handed[number])) < least:
                least, found = has, number
        return found

    async def computed_by(self, number: int, request: bytes, within_s: float = MOST_S) -> bytes | None:
        """Another worker's answer; None if it gave none in that time, and then it is computed here."""
        self._handed[number] += 1
        try:
            async with asyncio.timeout(min(within_s, MOST_S)):
                idle = self._idle[number]
                connection = idle.pop() if idle else await asyncio.open_unix_connection(self._path(number))
                try:
                    _send(connection[1], request)
                    answer = await _received(connection[0])
                except BaseException:
                    connection[1].close()
                    raise
            idle.append(connection)
            return answer or None
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            self._loads[number] = 0  # it was killed or hangs, and tells when it is there again
            return None
        finally:
            self._handed[number] -= 1

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._hearing.add(writer)
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                request = await _received(reader)
                try:
                    answer = await self._compute(request)
                except Exception:  # the other computes it for itself; its client shall not suffer from what is wrong here
                    log.exception("a request of another worker failed here, which computes it for itself")
                    answer = b""
                _send(writer, answer)
                await writer.drain()
        self._hearing.discard(writer)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.work"


def _send(writer: asyncio.StreamWriter, message: bytes) -> None:
    writer.write(_SIZE.pack(len(message)) + message)


async def _received(reader: asyncio.StreamReader) -> bytes:
    (size,) = _SIZE.unpack(await reader.readexactly(_SIZE.size))
    return await reader.readexactly(size)
