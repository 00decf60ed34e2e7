"""The processes of one server as one: each answers the others' questions, and computes feeds that would wait in another."""

import asyncio
import functools
from typing import Any

import orjson
from fastapi import FastAPI, HTTPException

from serving import logs, telemetry, wire
from serving.budget import Budget
from serving.engine import Engine
from serving.feed import feed_answer
from serving.metrics import Metrics, of_workers
from serving.peers import Peers, folder_of
from serving.running import engine_of
from serving.sharing import Sharing
from serving.status import status_of
from warehouse.errors import HeadraceError

METRICS, STATUS, REQUEST = "metrics", "status", "request"
"""What workers ask each other."""
_LATE_BY_S = 0.1
"""How long after its deadline a feed that another worker computes may still come. Then it is hurried along here."""
OF_WORKER = ("worker", "pid", "leads", "ready", "missing", "tick", "position", "forwardLog")


async def seated(engine: Engine, metrics: Metrics) -> Peers:
    """Once a worker is ready to answer: until then the others take what arrives. Raises HeadraceError if it cannot be, which
    ends the server."""
    may_come = True  # loading that ends just after a wait is seen by the next
    while not await asyncio.to_thread(engine.wait, 1.0):
        if not may_come:
            raise HeadraceError("; ".join(engine.missing()))
        may_come = engine.is_loading
    assert engine.seat is not None

    def answer(question: str) -> bytes:
        what, _, of = question.partition(" ")
        if what == METRICS:
            return metrics.text()
        if what == STATUS:
            return orjson.dumps(status_of(engine))
        return orjson.dumps(row) if what == REQUEST and (row := engine.recent.row(of)) else b""

    peers = Peers(folder_of(engine.home.path), engine.seat.number, answer)
    await peers.listen()
    return peers


async def shared(app: FastAPI, metrics: Metrics) -> Sharing:
    """This worker's part in the feeds of all. Peers must listen: their folder is made then."""
    engine = engine_of(app)
    assert engine.seat is not None
    compute = functools.partial(computed_for_another, app, metrics)
    sharing = Sharing(folder_of(engine.home.path), engine.seat.number, compute)
    await sharing.listen()
    return sharing


async def computed_for_another(app: FastAPI, metrics: Metrics, handed: bytes) -> bytes:
    """The answer to a feed as `to_hand_on` tells it; empty where the other worker is to compute it: this one refuses it, or
    has not read an event that was answered there, which the next feed there must count."""
    request_id, left_ms, position, span, body = orjson.loads(handed)
    if not engine_of(app).counts(position):
        return b""
    logs.request_id.set(request_id)
    try:
        with telemetry.below(span):
            return await feed_answer(app, metrics, wire.FeedRequest.model_validate(body), Budget.of_ms(left_ms))
    except HTTPException:
        return b""


def to_hand_on(app: FastAPI, body: bytes, budget: Budget) -> bytes:
    """A feed under way here, for another worker: the request as it came, and what belongs to it."""
    request_id, position = logs.request_id.get(), engine_of(app).told_position
    return orjson.dumps([request_id, budget.left_ms(), position, telemetry.carried(), orjson.Fragment(body)])


async def handed_on(app: FastAPI, metrics: Metrics, body: bytes, budget: Budget) -> bytes | None:
    """The answer of another worker, if one has less to do than this one; else None."""
    sharing: Sharing | None = app.state.sharing
    if sharing is None or (other := sharing.less_busy(app.state.in_flight)) is None:
        return None
    within_s = max(budget.left_ms(), 0) / 1000 + _LATE_BY_S
    answer = await sharing.computed_by(other, to_hand_on(app, body, budget), within_s)
    if answer is not None:
        metrics.handed_on.inc()
    return answer


async def row_of_peers(app: FastAPI, request_id: str) -> dict[str, Any] | None:
    """What another worker remembers of a request that it answered a moment ago."""
    peers: Peers | None = app.state.peers
    if peers is None or not request_id.isalnum():
        return None
    rows = (await peers.ask(f"{REQUEST} {request_id}")).values()
    return next((orjson.loads(row) for row in rows), None)


async def metrics_of_all(app: FastAPI, metrics: Metrics) -> bytes:
    """Prometheus text; of a server of several workers each sample with its label `worker`."""
    text, peers, seat = metrics.text(), app.state.peers, engine_of(app).seat
    return text if peers is None or seat is None else of_workers({seat.number: text, **await peers.ask(METRICS)})


async def status_of_all(app: FastAPI) -> dict[str, Any]:
    """This process's; of a server of several workers with where each of them stands."""
    known, peers = status_of(engine_of(app)), app.state.peers
    if peers is not None:
        others = [orjson.loads(told) for told in (await peers.ask(STATUS)).values()]
        known["workers"] = sorted(({name: one.get(name) for name in OF_WORKER} for one in [known, *others]), key=_number)
    return known


def _number(status: dict[str, Any]) -> int:
    return status["worker"]
