"""Requests that arrive when they are due, whether or not earlier ones are answered: an open loop, in a process of its own.

    python -m bench.serving.arrivals < plan.json > answers.json

A latency counts from the instant a request was due, so a server that falls behind is charged for all that waited (no
coordinated omission). Plain HTTP/1.1 over kept connections, so that the generator costs little beside the server it shares the
machine with; it tells how late it was itself.
"""

import asyncio
import contextlib
import gc
import json
import os
import selectors
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

_DRAIN_S = 5.0
"""How long after the last arrival answers are waited for; what has none then has failed."""
_SAMPLED_EVERY = 10
_CONNECTIONS = 32
"""Opened before the first request, and used in turn, as those of many clients are: a server of several processes has some of
them in each."""
_COMPLETE = (b'"degraded":[]',)


@dataclass(frozen=True)
class Plan:
    """rate_per_s None: a closed loop of `clients` requests at once. notes: how many an answer must hold to count as full."""

    port: int
    readers: list[str]
    seconds: float
    notes: int
    rate_per_s: float | None = None
    clients: int = 1
    first_reader: int = 0
    seed: int = 0


@dataclass
class Answers:
    """latency_ms: of full answers, in order of their end. late_ms: of the sending, behind the due instants. owed_s: what waited
    to be logged at the end, in seconds of arrivals (`capacity.Asker` asks the server)."""

    offered: int = 0
    failed: int = 0
    elapsed_s: float = 0.0
    owed_s: float = 0.0
    latency_ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    timings: list[dict[str, float]] = field(default_factory=list)


class _Connection(asyncio.Protocol):
    """One kept connection, one request at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._body_at, self._length = -1, 0
        self.answer: asyncio.Future[bytes] | None = None
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.is_open = transport, True

    def ask(self, request: bytes) -> "asyncio.Future[bytes]":
        self._buffer.clear()
        self._body_at = -1
        self.answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)  # type: ignore[attr-defined]
        return self.answer

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._body_at < 0:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            self._body_at = end + 4
            head = bytes(self._buffer[:end]).lower()
            self._length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        if len(self._buffer) >= self._body_at + self._length and self.answer is not None and not self.answer.done():
            self.answer.set_result(bytes(self._buffer))

    def close(self) -> None:
        self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(error or ConnectionError("the server closed the connection"))


class _Generator:
    def __init__(self, plan: Plan):
        self.plan, self.answers = plan, Answers()
        self._idle: deque[_Connection] = deque()
        self._connections: list[_Connection] = []
        self._next = plan.first_reader

    async def run(self) -> Answers:
        for _ in range(_CONNECTIONS):
            self._idle.append(await self._connect())
        started = time.perf_counter()
        await (self._closed() if self.plan.rate_per_s is None else self._open())
        self.answers.elapsed_s = time.perf_counter() - started
        for connection in self._connections:
            connection.close()
        return self.answers

    async def _closed(self) -> None:
        until = time.perf_counter() + self.plan.seconds

        async def client() -> None:
            while (now := time.perf_counter()) < until:
                await self._ask(now)

        await asyncio.gather(*(client() for _ in range(self.plan.clients)))

    async def _open(self) -> None:
        assert self.plan.rate_per_s is not None
        rng = np.random.default_rng(self.plan.seed)
        gaps = rng.exponential(1 / self.plan.rate_per_s, int(self.plan.rate_per_s * self.plan.seconds * 2) + 20)
        due_after = np.cumsum(gaps)
        due_after = due_after[due_after < self.plan.seconds]
        started = time.perf_counter() + 0.05
        asked = set()
        for after in due_after.tolist():
            due = started + after
            while (left := due - time.perf_counter()) > 0:
                await asyncio.sleep(left)
            self.answers.late_ms.append((time.perf_counter() - due) * 1000)
            asked.add(asyncio.ensure_future(self._ask(due)))
        _, pending = await asyncio.wait(asked, timeout=_DRAIN_S)
        for task in pending:
            task.cancel()
        self.answers.failed += len(pending)

    async def _ask(self, due: float) -> None:
        self.answers.offered += 1
        reader = self.plan.readers[self._next % len(self.plan.readers)]
        self._next += 1
        body = json.dumps({"userId": reader}).encode()
        head = f"POST /v1/feed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            connection = await self._connection()
            answer = await connection.ask(head.encode() + body)
        except OSError:
            self.answers.failed += 1
            return
        self._note(answer, (time.perf_counter() - due) * 1000)
        self._idle.append(connection)

    def _note(self, answer: bytes, latency_ms: float) -> None:
        is_full = answer.startswith(b"HTTP/1.1 200") and answer.count(b'"noteId":') == self.plan.notes
        if not (is_full and all(part in answer for part in _COMPLETE)):
            self.answers.failed += 1
            return
        self.answers.latency_ms.append(latency_ms)
        if len(self.answers.latency_ms) % _SAMPLED_EVERY == 0:
            told = json.loads(answer[answer.find(b"\r\n\r\n") + 4 :])
            self.answers.timings.append({**told["timings"], "candidates": told.get("numCandidates", 0)})

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.popleft()
            if connection.is_open:
                return connection
        return await self._connect()

    async def _connect(self) -> _Connection:
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, "127.0.0.1", self.plan.port)
        self._connections.append(connection)
        return connection


async def run_plan(plan: Plan) -> Answers:
    """Asks as the plan says, in this process."""
    return await _Generator(plan).run()


def _go_first() -> None:
    """Runs before all else on this machine, where that is allowed, as a client elsewhere would: what it waits for a core is no
    part of the server's answer."""
    with contextlib.suppress(AttributeError, OSError):  # no Linux, or not root
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def _precise_loop() -> asyncio.AbstractEventLoop:
    """The usual one waits for whole milliseconds (epoll), and would send half of the requests most of one late."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


def main() -> int:
    plan: dict[str, Any] = json.load(sys.stdin)
    gc.disable()  # a full collection takes 5 ms alone, with which requests then due would be charged
    _go_first()
    with asyncio.Runner(loop_factory=_precise_loop) as runner:
        answers = runner.run(run_plan(Plan(**plan)))
    json.dump(asdict(answers), sys.stdout)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
