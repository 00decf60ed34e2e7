"""The HTTP server: `uvicorn serving.app:app`, or `create_app` for one with its own home, clock and settings.

Routes (`routes/`) only translate. The work is done in `cascade.py`, on threads, so that the event loop stays free to say that
it is alive.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI
from threadpoolctl import threadpool_limits

from serving import telemetry, wire
from serving.cores import keep_to_own
from serving.engine import Engine
from serving.http import Edge, install_error_bodies
from serving.intake import Intake
from serving.line import Line
from serving.metrics import Metrics
from serving.routes.cascade import add_cascade
from serving.routes.events import add_events
from serving.routes.operations import add_operations
from serving.routes.page import add_page
from serving.seat import own_server
from serving.settings import Settings
from serving.short_turns import take_short_turns
from serving.status import watch
from serving.workers import seated, shared
from warehouse.clock import Clock
from warehouse.features.kinds.declared import Kinds
from warehouse.home import Home

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": wire.Problem, "description": what}
    for status, what in {
        400: "A declared feature of the request has another type; the answer says what would be right",
        404: "Not known here",
        413: "The body is too large",
        422: "Something in the body is not right; the answer says what would be",
        503: "Not ready, or too busy; the answer says why",
    }.items()
}


def create_app(
    home: Home | None = None,
    clock: Clock | None = None,
    settings: Settings | None = None,
    on_failure: Callable[[list[str]], None] | None = None,
    kinds: Kinds | None = None,
) -> FastAPI:
    """One server. Nothing is opened until it starts; what the environment says (HEADRACE_HOME, HEADRACE_CLOCK,
    HEADRACE_SERVING) is read then, so that importing this module cannot fail. on_failure is told, on the loading thread, what
    is missing when the server cannot become ready; without it the server stays up and /readyz says so. kinds: the features
    of the request and the like; those of the project's declarations when absent."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        torch.set_num_threads(1)  # requests are computed side by side; within one, threads only wait for each other
        threadpool_limits(1, user_api="blas")
        take_short_turns()  # the event loop's thread, at each step of an answer
        chosen = settings or Settings.from_env()
        server = own_server()
        the_home, the_clock = home or Home.from_env(), clock or Clock.from_env()
        engine = Engine(the_home, the_clock, chosen, on_failure, kinds, server, lambda: app.state.in_flight == 0)
        app.state.engine, app.state.peers, app.state.sharing, app.state.in_flight = engine, None, None, 0
        # beside other workers one thread computes: more would take turns at the interpreter and at the cores of the others
        threads = chosen.inference_threads if server is None else 1
        app.state.workers = ThreadPoolExecutor(threads, thread_name_prefix="cascade")
        app.state.line = Line(app.state.workers, threads, chosen.side_by_side, metrics.side_by_side.observe)
        app.state.writers = ThreadPoolExecutor(4, thread_name_prefix="events")
        intake = app.state.intake = Intake(chosen.waiting_events, chosen.max_log_bytes)
        metrics.gauge("events_waiting", "Posted events that wait for the log", lambda: intake.num_waiting)
        watch(metrics, engine)
        engine.start()
        try:
            if server is not None:
                app.state.peers = await seated(engine, metrics)
                assert engine.seat is not None
                keep_to_own(engine.seat.number)  # from here on: loading uses all
                app.state.sharing = await shared(app, metrics)
            yield
        finally:
            if app.state.sharing is not None:
                await app.state.sharing.close()
            if app.state.peers is not None:
                await app.state.peers.close()
            await asyncio.to_thread(engine.stop)
            app.state.workers.shutdown()
            app.state.writers.shutdown()

    app = FastAPI(
        title="Headrace",
        version="1",
        summary="A feed from retrieval to page, with every feature explained.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        telemetry=telemetry.OF_FASTAPI,
        responses=PROBLEMS,
    )
    install_error_bodies(app)
    limit = (settings or Settings.load()).max_body_bytes
    app.add_middleware(Edge, metrics=metrics, max_body_bytes=limit)
    add_cascade(app, metrics)
    add_events(app, metrics)
    add_operations(app, metrics)
    add_page(app)
    return app


app = create_app()
