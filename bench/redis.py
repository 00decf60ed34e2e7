"""A Redis of the benchmarks' own, spoken to in its protocol: no client to install, none whose speed would be measured."""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from warehouse.errors import HeadraceError

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


class Redis:
    """One connection."""

    def __init__(self, connection: socket.socket, answers: Any):
        self._connection, self._answers = connection, answers

    def pipeline(self, commands: Sequence[tuple[bytes, ...]]) -> list[bytes]:
        """Sends the commands at once; the answer of each must be one text."""
        self._connection.sendall(b"".join(map(_encoded, commands)))
        return [self._bulk() for _ in commands]

    def mget(self, keys: Sequence[bytes]) -> list[bytes]:
        """The values of keys that are all there."""
        self._connection.sendall(_encoded((b"MGET", *keys)))
        size = self._line(b"*")
        return [self._bulk() for _ in range(size)]

    def mset(self, values: dict[bytes, bytes]) -> None:
        self._connection.sendall(_encoded((b"MSET", *(word for pair in values.items() for word in pair))))
        if (answer := self._answers.readline()) != b"+OK\r\n":
            raise HeadraceError(f"redis answered {answer!r}")

    def _bulk(self) -> bytes:
        return self._answers.read(self._line(b"$") + 2)[:-2]

    def _line(self, kind: bytes) -> int:
        answer = self._answers.readline()
        if not answer.startswith(kind) or answer.startswith(kind + b"-"):
            raise HeadraceError(f"redis answered {answer!r}")
        return int(answer[1:])


def start_redis(folder: Path, stack: contextlib.ExitStack, options: Sequence[str] = ()) -> Redis | None:
    """A server that ends with the stack; None where there is no redis-server."""
    if (program := shutil.which("redis-server")) is None:
        return None
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", *options, "--dir", str(folder)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    stack.callback(lambda: (server.terminate(), server.wait()))
    connection = stack.enter_context(_connected(port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Redis(connection, stack.enter_context(connection.makefile("rb", buffering=1 << 16)))


def _connected(port: int) -> socket.socket:
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=30)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _encoded(words: tuple[bytes, ...]) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
