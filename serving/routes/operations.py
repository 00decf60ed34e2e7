"""Is it alive, is it ready, where does it stand."""

from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse

from serving.http import json_response
from serving.metrics import Metrics
from serving.running import engine_of
from serving.workers import metrics_of_all, status_of_all


def add_operations(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/livez", tags=["operations"])
    async def livez() -> Response:
        """The process is alive."""
        return json_response({"status": "alive"})

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> Response:
        """200 when feeds are answered, with what is degraded in all of them; 503 with what is missing, and what mends it."""
        engine = engine_of(app)
        missing = engine.missing()
        told = {"status": "not ready" if missing else "ready", "missing": missing, "degraded": engine.troubles()}
        return json_response(told, 503 if missing else 200)

    @app.get("/metrics", response_class=PlainTextResponse, tags=["operations"])
    async def prometheus() -> Response:
        """Prometheus text. Of a server of several workers, all of them, each sample with its label `worker`."""
        return Response(await metrics_of_all(app, metrics), media_type="text/plain; version=0.0.4")

    @app.get("/v1/status", tags=["operations"])
    async def status() -> Response:
        """Tick, position, versions, rows: where this server stands. Of a server of several workers, where each of them does."""
        return json_response(await status_of_all(app))
