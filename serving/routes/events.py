"""Posted events: each checked alone, durable and counted in fresh features before the answer."""

import asyncio
import functools
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response

from serving import collect, wire
from serving.http import json_response, sentence
from serving.metrics import Metrics
from serving.running import engine_of, world_of
from streaming_sql.records import DeadLetter


def add_events(app: FastAPI, metrics: Metrics) -> None:
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
        world, engine = world_of(app), engine_of(app)
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
            metrics.events("turned_away").inc(len(checked))
            raise HTTPException(429, f"{why}; send them again", headers={"Retry-After": str(after_s)})
        try:
            if letters:
                await write(engine.bury, letters)
            positions = await write(engine.accept, rows) if rows else []
        finally:
            app.state.intake.done(len(checked))
        metrics.events("accepted").inc(len(rows))
        metrics.events("rejected").inc(len(letters))
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
