"""The HTTP manners that all routes share: body limit, metrics, error bodies that name what would be right, JSON without NaN."""

import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import orjson
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import logs
from serving.metrics import Metrics
from warehouse.errors import HeadraceError

WORST_ERRORS_TOLD = 20


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """orjson writes NaN and infinity as null, so a value that is no number never breaks a client."""
    return Response(orjson.dumps(content), status, dict(headers or {}), "application/json")


def problem(
    status: int, detail: str, errors: Sequence[dict[str, str]] = (), headers: Mapping[str, str] | None = None
) -> Response:
    return json_response({"detail": detail, "errors": list(errors)}, status, headers)


def validation_errors(errors: Sequence[Any], start: str = "") -> list[dict[str, str]]:
    """pydantic's errors as where and what, without the input: it may be huge, secret or not even text."""
    told = []
    for error in errors[:WORST_ERRORS_TOLD]:
        where = ".".join(str(part) for part in error["loc"]) or "body"
        message = str(error["msg"]).removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            message = "is not a field here; names are camelCase, /docs lists them"
        told.append({"where": f"{start}{where}", "problem": message})
    return told


def sentence(errors: Sequence[dict[str, str]]) -> str:
    return "; ".join(f"{error['where']}: {error['problem']}" for error in errors[:3])


def install_error_bodies(app: FastAPI) -> None:
    """Every error has the shape of `wire.Problem`."""

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        errors = validation_errors(error.errors())
        return problem(422, sentence(errors), errors)

    @app.exception_handler(StarletteHTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        detail = str(error.detail)
        if error.status_code == 404 and detail == "Not Found":
            detail = f"nothing is at {request.url.path[:200]!r}; /docs lists what is"
        return problem(error.status_code, detail, headers=error.headers)

    @app.exception_handler(HeadraceError)
    async def _mendable(request: Request, error: HeadraceError) -> Response:
        return problem(503, str(error))


class PlainRoute(APIRoute):
    """Of an endpoint that takes a body and the request and nothing else, and answers with a response: what is right is read
    at once from its JSON, a third of what the framework takes, which says of the rest what is wrong."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        in_full, endpoint = super().get_route_handler(), self.endpoint
        assert self.body_field is not None
        model = self.body_field.field_info.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)

        async def handler(request: Request) -> Response:
            if request.headers.get("content-type") != "application/json":
                return await in_full(request)
            try:
                body = model.model_validate_json(await request.body())
            except (ClientDisconnect, ValidationError):
                return await in_full(request)
            return await endpoint(body, request)

        return handler


class Edge:
    """ASGI middleware: refuses bodies above the limit before they are in memory, counts and times every answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body_bytes: int):
        self.app, self.metrics, self.max_body_bytes = app, metrics, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, received = time.perf_counter(), 500, 0
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        logs.request_id.set(uuid.uuid4().hex)

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if declared.isdigit() and int(declared) > self.max_body_bytes:
                await problem(413, self._too_large())(scope, receive, watched_send)
            else:
                await self.app(scope, counted_receive, watched_send)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self.metrics.requests(route, str(status)).inc()
            took_s = time.perf_counter() - started
            self.metrics.latency(route).observe(took_s)
            if logs.access.isEnabledFor(logging.INFO):
                logs.access.info(
                    "answered", extra={"fields": {"route": route, "status": status, "ms": round(took_s * 1000, 2)}}
                )

    def _too_large(self) -> str:
        return f"the body is larger than {self.max_body_bytes} bytes; send it in pieces"
