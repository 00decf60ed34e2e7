"""A served world small enough to reason about: a simulated lake, models worked out by hand, a clock that a test moves, and a
real uvicorn server on a free port."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import uvicorn
from fastapi import FastAPI

from warehouse.time_algebra import newest_tick


@dataclass
class Server:
    """`get` and `post` speak HTTP to a server in this process."""

    base_url: str
    app: FastAPI
    client: httpx.Client

    @property
    def engine(self):
        return self.app.state.engine

    def get(self, path, **arguments):
        return self.client.get(path, **arguments)

    def post(self, path, body, **arguments):
        return self.client.post(path, json=body, **arguments)

    def feed(self, user_id, **more):
        answer = self.post("/v1/feed", {"userId": user_id, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def explain(self, request_id, note_id=None):
        answer = self.get(f"/v1/explain/{request_id}", params={} if note_id is None else {"noteId": note_id})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait_for_tick(self, timeout_s=20.0):
        """Until the server has moved to the newest tick that its clock allows."""
        world, deadline = self.engine.world, time.monotonic() + timeout_s
        while world.store.view().tick_us < newest_tick(world.clock.now_us()):
            assert time.monotonic() < deadline, "the tick does not move"
            time.sleep(0.01)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(app: FastAPI, timeout_s: float = 120.0) -> Iterator[Server]:
    """The app behind uvicorn, once it has answered /livez; stopped, with everything flushed, at the end."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, name="uvicorn", daemon=True)
    thread.start()
    base_url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=base_url, timeout=30.0, trust_env=False) as client:
            deadline = time.monotonic() + timeout_s
            while not server.started:
                assert thread.is_alive(), "the server ended while it started"
                assert time.monotonic() < deadline, f"no server on {base_url} after {timeout_s} s"
                time.sleep(0.02)
            yield Server(base_url, app, client)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until_ready(server: Server, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while (answer := server.get("/readyz")).status_code != 200:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.05)
