"""One feed, from a body that is valid to the answer's JSON: computed, remembered for the log, measured."""

import orjson
from fastapi import FastAPI, HTTPException

from serving import answers, cascade, wire
from serving.budget import Budget
from serving.company import Path
from serving.metrics import Metrics
from serving.outside import said
from serving.running import computed_in_company, engine_of, world_of
from serving.served import Served
from serving.world import World
from warehouse.errors import HeadraceError
from warehouse.features.kinds.values import Value


async def feed_answer(app: FastAPI, metrics: Metrics, body: wire.FeedRequest, budget: Budget) -> bytes:
    """The answer, JSON."""
    world = world_of(app)
    page_size = body.limit or world.settings.page_size
    context = said_by(world, body.context)
    surface, geohash = body.context.surface, body.context.geohash

    def path(company: int) -> Path[Served]:
        its = budget.within(company)
        return cascade.feed_path(world, body.user_id, body.feed_type, page_size, surface, context, its, geohash)

    served = await computed_in_company(app, metrics, path)
    engine_of(app).remember(served)
    for stage, ms in served.steps.timings_ms.items():
        metrics.stage(stage).observe(ms / 1000)
    for what in served.steps.degraded:
        metrics.degraded(what).inc()
    metrics.candidates.observe(len(served.candidates))
    return orjson.dumps(answers.feed_answer(served, world.catalogue))


def said_by(world: World, context: wire.Context) -> dict[str, Value]:
    """The declared features of the request. Raises 400 that names the key and what would be right."""
    try:
        return said(world.kinds, context.model_extra or {})
    except HeadraceError as error:
        raise HTTPException(400, str(error)) from None
