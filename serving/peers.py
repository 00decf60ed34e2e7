"""What the workers of one server ask each other: metrics, where each stands, what a request was served.

Each answers on a Unix socket of its own, in a folder that only this user may enter. A worker that does not answer in time is
left out, as one is that has just died. Knows nothing of what is asked.
"""

import asyncio
import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from warehouse.errors import HeadraceError

_ANSWERS_WITHIN_S = 2.0


def folder_of(home: Path) -> Path:
    """Where the sockets of a home's server are; short, as a socket's name may have a hundred letters or so."""
    digest = hashlib.blake2b(str(home.resolve()).encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"headrace-{os.getuid()}-{digest}"


class Peers:
    """One worker's ear, and its questions to the others."""

    def __init__(self, folder: Path, number: int, answer: Callable[[str], bytes]):
        """number: this worker's. answer: of a question, one line; called on threads."""
        self._folder, self._number, self._answer = folder, number, answer
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        """Raises HeadraceError if the folder belongs to somebody else."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if (owned := self._folder.stat()).st_uid != os.getuid() or owned.st_mode & 0o077:
            raise HeadraceError(f"{self._folder} is open to other users; remove it")
        self._path.unlink(missing_ok=True)  # of a worker with this number that was killed
        self._server = await asyncio.start_unix_server(self._hear, self._path)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    async def ask(self, question: str) -> dict[int, bytes]:
        """The answers of the others, by their number, in its order."""
        others = sorted(int(path.stem) for path in self._folder.glob("*.sock") if path.stem != str(self._number))
        answers = await asyncio.gather(*(self._asked(number, question) for number in others))
        return {number: answer for number, answer in zip(others, answers, strict=True) if answer is not None}

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._number}.sock"

    async def _asked(self, number: int, question: str) -> bytes | None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_ANSWERS_WITHIN_S):
                reader, writer = await asyncio.open_unix_connection(self._folder / f"{number}.sock")
                with contextlib.closing(writer):
                    writer.write(question.encode() + b"\n")
                    answer = await reader.read(-1)
                    return answer or None
        return None

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            question = (await reader.readline()).decode().rstrip("\n")
            writer.write(await asyncio.to_thread(self._answer, question))
            await writer.drain()
