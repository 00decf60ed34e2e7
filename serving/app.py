"""The HTTP server: `uvicorn serving.app:app`, or `create_app` for one with its own home, clock and settings.

Routes only translate: bodies to arguments, answers to words. The work is done in `cascade.py`, on threads, so that the event
loop stays free to say that it is alive.
"""

import asyncio
import contextvars
import functools
import logging
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import orjson
import torch
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse
from threadpoolctl import threadpool_limits

from serving import answers, cascade, collect, logs, telemetry, wire
from serving.budget import Budget
from serving.caches import CACHES
from serving.engine import Engine
from serving.explain import row_in_lake
from serving.http import Edge, install_error_bodies, json_response, sentence
from serving.intake import Intake
from serving.metrics import Metrics, of_workers
from serving.models import MEMOS
from serving.outside import said
from serving.peers import Peers, folder_of
from serving.seat import own_server
from serving.settings import Settings
from serving.sharing import Sharing
from serving.world import World
from streaming_sql.records import DeadLetter
from warehouse.clock import Clock
from warehouse.errors import HeadraceError
from warehouse.features.kinds.declared import Kinds
from warehouse.features.kinds.values import Value
from warehouse.home import Home

log = logging.getLogger(__name__)
T = TypeVar("T")

PAGE = Path(__file__).with_name("ui.html")
API_PAGE = Path(__file__).with_name("docs.html")
"""Our own, because the framework's loads its script from elsewhere and stays blank where there is no elsewhere."""
METRICS, STATUS, REQUEST = "metrics", "status", "request"
"""What workers ask each other."""
OF_WORKER = ("worker", "pid", "leads", "ready", "missing", "tick", "position", "forwardLog")
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
        chosen = settings or Settings.from_env()
        server = own_server()
        engine = Engine(home or Home.from_env(), clock or Clock.from_env(), chosen, on_failure, kinds, server)
        app.state.engine, app.state.peers, app.state.sharing = engine, None, None
        # beside other workers one thread computes: more would take turns at the interpreter and at the cores of the others
        threads = chosen.inference_threads if server is None else 1
        app.state.workers = ThreadPoolExecutor(threads, thread_name_prefix="cascade")
        app.state.writers = ThreadPoolExecutor(4, thread_name_prefix="events")
        intake = app.state.intake = Intake(chosen.waiting_events, chosen.max_log_bytes)
        metrics.gauge("events_waiting", "Posted events that wait for the log", lambda: intake.num_waiting)
        _watch(metrics, engine)
        engine.start()
        try:
            if server is not None:
                app.state.peers = await _seated(engine, metrics)
                app.state.sharing = await _shared(app, metrics)
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
    _add_cascade(app, metrics)
    _add_events(app, metrics)
    _add_operations(app, metrics)
    _add_page(app)
    return app


async def _seated(engine: Engine, metrics: Metrics) -> Peers:
    """Once a worker is ready to answer: until then the others take what arrives. Raises HeadraceError if it cannot be, which
    ends the server."""
    while not await asyncio.to_thread(engine.wait, 1.0):
        if not engine.is_loading:
            raise HeadraceError("; ".join(engine.missing()))
    assert engine.seat is not None

    def answer(question: str) -> bytes:
        what, _, of = question.partition(" ")
        if what == METRICS:
            return metrics.text()
        if what == STATUS:
            return orjson.dumps(_status(engine))
        return orjson.dumps(row) if what == REQUEST and (row := engine.recent.row(of)) else b""

    peers = Peers(folder_of(engine.home.path), engine.seat.number, answer)
    await peers.listen()
    return peers


async def _shared(app: FastAPI, metrics: Metrics) -> Sharing:
    """This worker's part in the feeds of all. Peers must listen: their folder is made then."""
    engine = _engine(app)
    assert engine.seat is not None

    async def compute(handed: bytes) -> bytes:
        request_id, left_ms, position, body = orjson.loads(handed)
        if not engine.counts(position):
            return b""  # whoever posted an event there sees it in the next feed
        logs.request_id.set(request_id)
        return await _feed(app, metrics, wire.FeedRequest.model_validate(body), Budget.of_ms(left_ms))

    sharing = Sharing(folder_of(engine.home.path), engine.seat.number, compute)
    await sharing.listen()
    return sharing


def _engine(app: FastAPI) -> Engine:
    return app.state.engine


def _world(app: FastAPI) -> World:
    """The loaded world. Raises 503 that names what is missing."""
    engine = _engine(app)
    world = engine.world
    if world is None or engine.missing():
        raise HTTPException(503, "not ready: " + "; ".join(engine.missing()), headers={"Retry-After": "2"})
    return world


async def _compute(app: FastAPI, metrics: Metrics, work: Callable[[], T]) -> T:
    """Runs work on the cascade's threads; 503 when too many requests wait already."""
    settings = _engine(app).settings
    waiting = getattr(app.state, "in_flight", 0)
    if waiting >= settings.waiting_requests + settings.inference_threads:
        metrics.shed.inc()
        raise HTTPException(503, f"{waiting} requests are waiting already; try again", headers={"Retry-After": "1"})
    _note_in_flight(app, +1)
    try:
        within = contextvars.copy_context()  # the request's id and span
        return await asyncio.get_running_loop().run_in_executor(app.state.workers, within.run, work)
    finally:
        _note_in_flight(app, -1)


def _note_in_flight(app: FastAPI, change: int) -> None:
    app.state.in_flight = in_flight = getattr(app.state, "in_flight", 0) + change
    if app.state.sharing is not None:
        app.state.sharing.tell(in_flight)


async def _feed(app: FastAPI, metrics: Metrics, body: wire.FeedRequest, budget: Budget) -> bytes:
    """The answer, JSON."""
    world = _world(app)
    page_size = body.limit or world.settings.page_size
    context = _said(world, body.context)
    surface, geohash = body.context.surface, body.context.geohash
    work = functools.partial(cascade.feed, world, body.user_id, body.feed_type, page_size, surface, context, budget, geohash)
    served = await _compute(app, metrics, work)
    _engine(app).remember(served)
    for stage, ms in served.steps.timings_ms.items():
        metrics.stage.labels(stage).observe(ms / 1000)
    for what in served.steps.degraded:
        metrics.degraded.labels(what).inc()
    metrics.candidates.observe(len(served.candidates))
    return orjson.dumps(answers.feed_answer(served, world.catalogue))


async def _handed_on(app: FastAPI, metrics: Metrics, body: bytes, budget: Budget) -> bytes | None:
    """The answer of another worker, if one has less to do than this one; else None."""
    sharing: Sharing | None = app.state.sharing
    if sharing is None or (other := sharing.less_busy(getattr(app.state, "in_flight", 0))) is None:
        return None
    handed = [logs.request_id.get(), budget.left_ms(), _engine(app).told_position, orjson.Fragment(body)]
    answer = await sharing.computed_by(other, orjson.dumps(handed))
    if answer is not None:
        metrics.handed_on.inc()
    return answer


def _add_cascade(app: FastAPI, metrics: Metrics) -> None:
    @app.post("/v1/feed", response_model=wire.FeedResponse, tags=["feed"])
    async def feed(body: wire.FeedRequest, request: Request) -> Response:
        """A page of notes for one reader. A reader never met gets what is trending and fresh."""
        budget = Budget.of_ms(body.deadline_ms or _world(app).settings.deadline_ms)
        answer = await _handed_on(app, metrics, await request.body(), budget)
        return Response(answer or await _feed(app, metrics, body, budget), media_type="application/json")

    @app.post("/v1/retrieve", response_model=list[wire.RetrievedNote], tags=["stages"])
    async def retrieve(body: wire.RetrieveRequest) -> Response:
        """Candidates, best recall first. What failed or was relaxed is named in the header `Headrace-Degraded`."""
        world = _world(app)
        work = functools.partial(cascade.retrieve_alone, world, body.user_id, body.feed_type, body.limit, body.context.geohash)
        candidates, degraded = await _compute(app, metrics, work)
        return json_response(answers.retrieved_answer(candidates, world.catalogue), headers=_degraded(degraded))

    @app.post("/v1/rank/l1", response_model=list[wire.L1RankedNote], tags=["stages"])
    async def rank_l1(body: wire.RankL1Request) -> Response:
        """The candidates that L1 would keep, best first. A note given twice counts once; an unknown one is scored as new."""
        world = _world(app)
        notes = _once(body.candidates, world)
        note_ids = [note.note_id for note in notes]
        work = functools.partial(
            cascade.rank_l1_alone, world, body.user_id, note_ids, body.top_k, body.context.surface, _said(world, body.context)
        )
        authors, scores, order, degraded = await _compute(app, metrics, work)
        return json_response(answers.l1_answer(notes, authors, scores, order), headers=_degraded(degraded))

    @app.post("/v1/rank/l2", response_model=list[wire.L2RankedNote], tags=["stages"])
    async def rank_l2(body: wire.RankL2Request) -> Response:
        """The candidates by final score, best first, with the probability of every head."""
        world = _world(app)
        notes = _once(body.candidates, world)
        note_ids = [note.note_id for note in notes]
        work = functools.partial(
            cascade.rank_l2_alone, world, body.user_id, note_ids, body.top_k, body.context.surface, _said(world, body.context)
        )
        authors, predictions, scores, order, degraded = await _compute(app, metrics, work)
        return json_response(answers.l2_answer(notes, authors, predictions, scores, order), headers=_degraded(degraded))

    @app.get("/v1/explain/{request_id}", tags=["feed"])
    async def explain(
        request_id: str, note_id: Annotated[str | None, Query(alias="noteId", max_length=256)] = None
    ) -> Response:
        """Why each note of an answer is where it is, or at which stage it was dropped, with features, T and K."""
        world, engine = _world(app), _engine(app)
        assert engine.lake is not None
        row = engine.recent.row(request_id) or await _row_of_peers(app, request_id)
        row = row or await asyncio.to_thread(row_in_lake, engine.lake, request_id)
        if row is None:
            known_when = "a row is in the lake some seconds after its answer"
            raise HTTPException(404, f"no request {request_id[:64]!r} in the forward log; {known_when}")
        answer = answers.explain_answer(row, note_id)
        if answer is None:
            why = "it is not a known note"
            if note_id in world.catalogue.row_of:
                why = "the reader had seen it, or no generator brought it"
            raise HTTPException(404, f"note {str(note_id)[:64]!r} was no candidate of this request: {why}")
        return json_response(answer)


async def _row_of_peers(app: FastAPI, request_id: str) -> dict[str, Any] | None:
    """What another worker remembers of a request that it answered a moment ago."""
    peers: Peers | None = app.state.peers
    if peers is None or not request_id.isalnum():
        return None
    rows = (await peers.ask(f"{REQUEST} {request_id}")).values()
    return next((orjson.loads(row) for row in rows), None)


def _said(world: World, context: wire.Context) -> dict[str, Value]:
    """The declared features of the request. Raises 400 that names the key and what would be right."""
    try:
        return said(world.kinds, context.model_extra or {})
    except HeadraceError as error:
        raise HTTPException(400, str(error)) from None


def _once(notes: list[wire.Note], world: World) -> list[wire.Note]:
    """Each note once, the first of equals. Raises 422 above the limit."""
    most = world.settings.max_candidates
    if len(notes) > most:
        raise HTTPException(422, f"candidates: at most {most} at once, got {len(notes)}")
    return list({note.note_id: note for note in reversed(notes)}.values())[::-1]


def _degraded(names: list[str]) -> dict[str, str]:
    return {"Headrace-Degraded": ",".join(names)} if names else {}


def _add_events(app: FastAPI, metrics: Metrics) -> None:
    single = wire.EventIn.model_json_schema()
    batch = {
        "type": "object",
        "required": ["events"],
        "properties": {"events": {"type": "array", "items": single, "minItems": 1, "maxItems": collect.MOST_EVENTS}},
    }

    content = {
        "application/json": {"schema": {"anyOf": [single, batch]}},
        "application/x-ndjson": {"schema": {"type": "string", "description": "One event a line"}},
    }
    answers_documented: dict[int | str, dict[str, Any]] = {
        202: {"model": wire.EventsResponse, "description": "All events are durable"},
        207: {"model": wire.EventsResponse, "description": "Some are durable, some refused; `results` says which and why"},
        429: {"model": wire.Problem, "description": "Too many events wait; none was taken; come back after Retry-After"},
    }

    @app.post(
        "/v1/events",
        status_code=202,
        response_model=wire.EventsResponse,
        responses=answers_documented,
        tags=["events"],
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )
    async def events(request: Request) -> Response:
        """One event, `{"events": [...]}`, or NDJSON. The answer comes when the accepted ones are durable and count in
        fresh features.

        202 when all are accepted; 207 with a result per event when only some are; 422 when none is. What is refused is kept in
        lake.dead_letters with the reason. Sending an `eventId` again changes nothing."""
        world, engine = _world(app), _engine(app)
        body = await request.body()
        write = functools.partial(asyncio.get_running_loop().run_in_executor, app.state.writers)
        try:
            posted = collect.parse(body, request.headers.get("content-type", ""))
        except ValueError as error:
            if body:
                await write(engine.bury, [DeadLetter(str(error), body.decode(errors="replace"))])
            raise HTTPException(422, str(error)) from None
        checked = collect.check(posted, world.catalogue, world.clock.now_us())
        rows = [one.row for one in checked if one.row is not None]
        letters = [one.letter() for one in checked if one.row is None]
        assert engine.log is not None
        if refusal := app.state.intake.why_not(len(checked), engine.log):
            why, after_s = refusal
            metrics.events.labels("turned_away").inc(len(checked))
            raise HTTPException(429, f"{why}; send them again", headers={"Retry-After": str(after_s)})
        try:
            if letters:
                await write(engine.bury, letters)
            positions = await write(engine.accept, rows) if rows else []
        finally:
            app.state.intake.done(len(checked))
        metrics.events.labels("accepted").inc(len(rows))
        metrics.events.labels("rejected").inc(len(letters))
        given = iter(positions)
        results = [_event_result(one, given) for one in checked]
        answer = {"accepted": len(rows), "rejected": len(letters), "results": results}
        if not rows:
            errors = [{"where": f"events.{place}", "problem": one.error or ""} for place, one in enumerate(checked[:20])]
            return json_response({"detail": sentence(errors), "errors": errors, **answer}, 422)
        return json_response(answer, 207 if letters else 202)


def _event_result(one: collect.Checked, positions: Any) -> dict[str, Any]:
    if one.row is None:
        return {"eventId": one.event_id, "status": "rejected", "partition": None, "offset": None, "error": one.error}
    partition, offset = next(positions)
    return {"eventId": one.event_id, "status": "accepted", "partition": partition, "offset": offset, "error": None}


def _add_operations(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/livez", tags=["operations"])
    async def livez() -> Response:
        """The process is alive."""
        return json_response({"status": "alive"})

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> Response:
        """200 when feeds are answered; 503 with what is missing, each with the command that mends it."""
        missing = _engine(app).missing()
        return json_response({"status": "not ready" if missing else "ready", "missing": missing}, 503 if missing else 200)

    @app.get("/metrics", response_class=PlainTextResponse, tags=["operations"])
    async def prometheus() -> Response:
        """Prometheus text. Of a server of several workers, all of them, each sample with its label `worker`."""
        text, peers, seat = metrics.text(), app.state.peers, _engine(app).seat
        if peers is not None and seat is not None:
            text = of_workers({seat.number: text, **await peers.ask(METRICS)})
        return Response(text, media_type="text/plain; version=0.0.4")

    @app.get("/v1/status", tags=["operations"])
    async def status() -> Response:
        """Tick, position, versions, rows: where this server stands. Of a server of several workers, where each of them does."""
        known, peers = _status(_engine(app)), app.state.peers
        if peers is not None:
            others = [orjson.loads(told) for told in (await peers.ask(STATUS)).values()]
            known["workers"] = sorted(({name: one.get(name) for name in OF_WORKER} for one in [known, *others]), key=_number)
        return json_response(known)


def _number(status: dict[str, Any]) -> int:
    return status["worker"]


def _status(engine: Engine) -> dict[str, Any]:
    world, forward_log = engine.world, engine.forward_log
    known: dict[str, Any] = {
        "ready": not engine.missing(),
        "missing": engine.missing(),
        "clock": answers.instant(engine.clock.now_us()),
    }
    if engine.seat is not None:
        known |= {"worker": engine.seat.number, "pid": os.getpid(), "leads": engine.seat.leads}
    if world is None or forward_log is None or engine.log is None:
        return known
    view = world.store.view()
    return known | {
        "tick": answers.instant(view.tick_us),
        "position": list(view.position),
        "logEnd": list(engine.log.end()),
        "modelVersions": dict(world.models.versions),
        "declarationsHash": world.declarations_hash,
        "featureGroups": {name: len(group.feature_names) + len(group.sequence_names) for name, group in world.groups.items()},
        "notes": len(world.catalogue),
        "readers": len(world.readers),
        "caches": {
            name: {"entries": len(cache), "hits": cache.num_hits, "shared": cache.num_shared, "misses": cache.num_misses}
            for name, cache in world.caches.by_name().items()
        }
        | {
            name: {"entries": len(memo), "hits": memo.num_hits, "misses": memo.num_misses}
            for name, memo in world.models.memos().items()
        },
        "forwardLog": {
            "written": forward_log.num_written,
            "waiting": forward_log.num_waiting,
            "dropped": forward_log.num_dropped,
            "failedWrites": forward_log.num_failed_writes,
        },
    }


def _watch(metrics: Metrics, engine: Engine) -> None:
    def of_log(name: str) -> Callable[[], float]:
        return lambda: float(getattr(engine.forward_log, name, 0) or 0)

    def tick_age_s() -> float:
        world = engine.world
        return (engine.clock.now_us() - world.store.view().tick_us) / 1e6 if world else float("nan")

    def of_cache(name: str, result: str) -> float:
        world = engine.world
        kept = (world.caches.by_name() | world.models.memos()).get(name) if world else None
        return float(getattr(kept, f"num_{result}", 0))

    for name in (*CACHES, *MEMOS):
        metrics.cache(name, functools.partial(of_cache, name))
    metrics.versions(lambda: engine.world.models.versions if engine.world else {})
    metrics.gauge("ready", "1 when feeds are answered", lambda: 0.0 if engine.missing() else 1.0)
    metrics.gauge("tick_age_seconds", "Server clock minus T; above 900 the stream is stuck", tick_age_s)
    metrics.gauge("forward_log_waiting", "Requests that wait for the lake", of_log("num_waiting"))
    metrics.gauge("forward_log_written", "Requests written to the lake since the start", of_log("num_written"))
    metrics.gauge("forward_log_dropped", "Requests lost because the queue was full", of_log("num_dropped"))
    metrics.gauge(
        "forward_log_failed_writes", "Writes to the lake that failed and were tried again", of_log("num_failed_writes")
    )


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def home() -> Response:
        return RedirectResponse("/ui")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)

    @app.get("/ui", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(), headers={"Cache-Control": "no-cache"})

    @app.get("/docs", include_in_schema=False)
    async def api_page() -> Response:
        return HTMLResponse(API_PAGE.read_text(), headers={"Cache-Control": "no-cache"})

    @app.get("/ui/data", include_in_schema=False)
    async def page_data() -> Response:
        """What the page's header and reader list show."""
        engine = _engine(app)
        report = engine.home.models / "report.json"
        readers = engine.world.readers.most_active(60) if engine.world else []
        return json_response(
            {
                "status": _status(engine),
                "readers": [{"userId": user_id, "numNotes": num_notes} for user_id, num_notes in readers],
                "report": orjson.loads(report.read_bytes()) if report.exists() else None,
                "headWeights": dict(engine.settings.head_weights),
            }
        )


app = create_app()
