"""What the bench's load generator counts: the time from when a request was due, not from when it could be sent."""

import asyncio
import json

from bench.serving.arrivals import Answers, Plan, run_plan
from bench.serving.capacity import dropped_rows

BODY = json.dumps({"notes": [{"noteId": "n1"}], "degraded": [], "timings": {"total": 1.0}}, separators=(",", ":")).encode()


class Server:
    """Answers at once, but for one stall that stops everything, as a lock or a collection would."""

    def __init__(self, stall_at=None, stall_s=0.0, status=200, body=BODY):
        self.stall_at, self.stall_s, self.status, self.body, self.num_asked = stall_at, stall_s, status, body, 0
        self.num_opened = self.num_closed = 0

    async def answer(self, reader, writer):
        while head := await reader.readuntil(b"\r\n\r\n"):
            await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
            self.num_asked += 1
            if self.num_asked == self.stall_at:
                self.open.clear()
                asyncio.get_running_loop().call_later(self.stall_s, self.open.set)
            await self.open.wait()
            writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (self.status, len(self.body), self.body))

    async def asked(self, **plan) -> Answers:
        self.open = asyncio.Event()
        self.open.set()

        async def until_closed(reader, writer):
            self.num_opened += 1
            try:
                await self.answer(reader, writer)
            except asyncio.IncompleteReadError:
                writer.close()
                await writer.wait_closed()
                self.num_closed += 1

        async with await asyncio.start_server(until_closed, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            answers = await run_plan(Plan(port=port, readers=["u1", "u2"], notes=1, **plan))
            while self.num_closed < self.num_opened:
                await asyncio.sleep(0.005)
            return answers


def test_a_stall_is_charged_to_all_that_came_due_in_it():
    answers = asyncio.run(Server(stall_at=20, stall_s=0.5).asked(seconds=1.0, rate_per_s=100.0))
    assert answers.failed == 0
    assert 60 < answers.offered == len(answers.latency_ms) < 150
    slow = [latency for latency in answers.latency_ms if latency > 100]
    assert 20 < len(slow) < 80  # about 40 came due in the first 400 ms of the stall, and a closed loop would know of one
    assert max(slow) > 400


def test_a_closed_loop_asks_again_when_it_is_answered():
    answers = asyncio.run(Server().asked(seconds=0.3, clients=2))
    assert answers.offered == len(answers.latency_ms) > 10


def test_what_is_no_full_page_has_failed():
    degraded = BODY.replace(b'"degraded":[]', b'"degraded":["l2"]')
    for server in (Server(status=503), Server(body=degraded), Server(body=b'{"notes":[],"degraded":[]}')):
        answers = asyncio.run(server.asked(seconds=0.2, rate_per_s=50.0))
        assert answers.failed == answers.offered > 0
        assert answers.latency_ms == []


def test_rows_that_the_forward_log_drops_are_counted(server, monkeypatch):
    port = int(server.base_url.rsplit(":", 1)[1])
    dropped = dropped_rows(port)
    monkeypatch.setattr(server.engine.forward_log, "num_dropped", dropped + 3)
    assert dropped_rows(port) == dropped + 3
