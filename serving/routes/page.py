"""The page at `/ui` and that of the API at `/docs`."""

from pathlib import Path

import orjson
from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from serving.http import json_response
from serving.running import engine_of
from serving.status import status_of

_FOLDER = Path(__file__).parents[1]
PAGE = _FOLDER / "ui.html"
API_PAGE = _FOLDER / "docs.html"
"""Our own, because the framework's loads its script from elsewhere and stays blank where there is no elsewhere."""


def add_page(app: FastAPI) -> None:
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
        engine = engine_of(app)
        report = engine.home.models / "report.json"
        readers = engine.world.readers.most_active(60) if engine.world else []
        return json_response(
            {
                "status": status_of(engine),
                "readers": [{"userId": user_id, "numNotes": num_notes} for user_id, num_notes in readers],
                "report": orjson.loads(report.read_bytes()) if report.exists() else None,
                "headWeights": dict(engine.settings.head_weights),
            }
        )
