"""What a running app holds in its `state`, as routes come by it, and the threads that their work is done on."""

import asyncio
import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from fastapi import FastAPI, HTTPException

from serving.engine import Engine
from serving.line import PathIn
from serving.metrics import Metrics
from serving.world import World

T = TypeVar("T")


def engine_of(app: FastAPI) -> Engine:
    return app.state.engine


def world_of(app: FastAPI) -> World:
    """The loaded world. Raises 503 that names what is missing."""
    engine = engine_of(app)
    world = engine.world
    if world is None or engine.missing():
        raise HTTPException(503, "not ready: " + "; ".join(engine.missing()), headers={"Retry-After": "2"})
    return world


async def computed(app: FastAPI, metrics: Metrics, work: Callable[[], T]) -> T:
    """Runs work on the cascade's threads; 503 when too many requests wait already."""
    with _in_flight(app, metrics):
        within = contextvars.copy_context()  # the request's id and span
        return await asyncio.get_running_loop().run_in_executor(app.state.workers, within.run, work)


async def computed_in_company(app: FastAPI, metrics: Metrics, path_in: PathIn[T]) -> T:
    """The path's result, computed on the cascade's threads beside those that wait as it does; 503 when too many do."""
    with _in_flight(app, metrics):
        return await app.state.line.computed(path_in)


@contextmanager
def _in_flight(app: FastAPI, metrics: Metrics) -> Iterator[None]:
    settings = engine_of(app).settings
    waiting = app.state.in_flight
    if waiting >= settings.waiting_requests + settings.inference_threads:
        metrics.shed.inc()
        raise HTTPException(503, f"{waiting} requests are waiting already; try again", headers={"Retry-After": "1"})
    _note_in_flight(app, +1)
    try:
        yield
    finally:
        _note_in_flight(app, -1)


def _note_in_flight(app: FastAPI, change: int) -> None:
    app.state.in_flight = in_flight = app.state.in_flight + change
    if app.state.sharing is not None:
        app.state.sharing.tell(in_flight)
