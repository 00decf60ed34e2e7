"""A feed, each of its stages alone, and why a note of an answer is where it is."""

import asyncio
import functools
from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import FastAPI, HTTPException, Query, Request, Response

from serving import answers, cascade, wire
from serving.budget import Budget
from serving.explain import row_in_lake
from serving.feed import feed_answer, said_by
from serving.http import PlainRoute, json_response
from serving.metrics import Metrics
from serving.running import computed, engine_of, world_of
from serving.workers import handed_on, row_of_peers
from serving.world import World

Ranked = TypeVar("Ranked")


def add_cascade(app: FastAPI, metrics: Metrics) -> None:
    async def feed(body: wire.FeedRequest, request: Request) -> Response:
        """A page of notes for one reader. A reader never met gets what is trending and fresh."""
        budget = Budget.of_ms(body.deadline_ms or world_of(app).settings.deadline_ms)
        answer = await handed_on(app, metrics, await request.body(), budget)
        return Response(answer or await feed_answer(app, metrics, body, budget), media_type="application/json")

    app.router.add_api_route(
        "/v1/feed",
        feed,
        methods=["POST"],
        response_model=wire.FeedResponse,
        tags=["feed"],
        route_class_override=PlainRoute,
    )

    @app.post("/v1/retrieve", response_model=list[wire.RetrievedNote], tags=["stages"])
    async def retrieve(body: wire.RetrieveRequest) -> Response:
        """Candidates, best recall first. What failed or was relaxed is named in the header `Headrace-Degraded`."""
        world = world_of(app)
        work = functools.partial(cascade.retrieve_alone, world, body.user_id, body.feed_type, body.limit, body.context.geohash)
        candidates, degraded = await computed(app, metrics, work)
        return json_response(answers.retrieved_answer(candidates, world.catalogue), headers=_degraded(degraded))

    async def ranked(
        rank: Callable[..., Ranked], body: wire.RankL1Request | wire.RankL2Request
    ) -> tuple[list[wire.Note], Ranked]:
        """(the candidates, each once; what the stage says of them)."""
        world = world_of(app)
        notes, surface = _once(body.candidates, world), body.context.surface
        asked = body.user_id, [note.note_id for note in notes], body.top_k, surface, said_by(world, body.context)
        return notes, await computed(app, metrics, functools.partial(rank, world, *asked))

    @app.post("/v1/rank/l1", response_model=list[wire.L1RankedNote], tags=["stages"])
    async def rank_l1(body: wire.RankL1Request) -> Response:
        """The candidates that L1 would keep, best first. A note given twice counts once; an unknown one is scored as new."""
        notes, (authors, scores, order, degraded) = await ranked(cascade.rank_l1_alone, body)
        return json_response(answers.l1_answer(notes, authors, scores, order), headers=_degraded(degraded))

    @app.post("/v1/rank/l2", response_model=list[wire.L2RankedNote], tags=["stages"])
    async def rank_l2(body: wire.RankL2Request) -> Response:
        """The candidates by final score, best first, with the probability of every head."""
        notes, (authors, predictions, scores, order, degraded) = await ranked(cascade.rank_l2_alone, body)
        return json_response(answers.l2_answer(notes, authors, predictions, scores, order), headers=_degraded(degraded))

    @app.get("/v1/explain/{request_id}", tags=["feed"])
    async def explain(
        request_id: str, note_id: Annotated[str | None, Query(alias="noteId", max_length=256)] = None
    ) -> Response:
        """Why each note of an answer is where it is, or at which stage it was dropped, with features, T and K."""
        world, engine = world_of(app), engine_of(app)
        assert engine.lake is not None
        row = engine.recent.row(request_id) or await row_of_peers(app, request_id)
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


def _once(notes: list[wire.Note], world: World) -> list[wire.Note]:
    """Each note once, the first of equals. Raises 422 above the limit."""
    most = world.settings.max_candidates
    if len(notes) > most:
        raise HTTPException(422, f"candidates: at most {most} at once, got {len(notes)}")
    return list({note.note_id: note for note in reversed(notes)}.values())[::-1]


def _degraded(names: list[str]) -> dict[str, str]:
    return {"Headrace-Degraded": ",".join(names)} if names else {}
