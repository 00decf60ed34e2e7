"""OpenTelemetry spans of a request's stages, below the span that FastAPI makes of the request.

Without an SDK they cost a function call and go nowhere. They are sent where OTEL_EXPORTER_OTLP_ENDPOINT says, if the extra
`telemetry` is installed, or where a provider that the launcher sets sends them. No span holds a reader's id, and FastAPI's own
log records are off: they hold what was in a body that it refused.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from fastapi.telemetry import TelemetryConfig
from opentelemetry import context, propagate, trace

from serving.company import Path

P = ParamSpec("P")
Result = TypeVar("Result")
CANDIDATES, REQUEST_ID, DEGRADED = "headrace.candidates", "headrace.request_id", "headrace.degraded"
"""Attributes of spans: how many candidates a stage had, the id of the answer, what was left out of it."""
tracer = trace.get_tracer("headrace.serving")
OF_FASTAPI: TelemetryConfig = {"auto_configure": True, "operation_spans": False, "metrics": False, "logs": False}
"""Metrics are Prometheus's (`serving.metrics`)."""


def spanned(name: str) -> Callable[[Callable[P, Path[Result]]], Callable[P, Path[Result]]]:
    """A span around a path, from its first step to its last."""

    def within(path_of: Callable[P, Path[Result]]) -> Callable[P, Path[Result]]:
        @wraps(path_of)
        def path(*args: P.args, **kwargs: P.kwargs) -> Path[Result]:
            with tracer.start_as_current_span(name):
                return (yield from path_of(*args, **kwargs))

        return path

    return within


def carried() -> dict[str, str]:
    """The span under way, for `below` in another process."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier


@contextmanager
def below(carrier: Mapping[str, str]) -> Iterator[None]:
    """Spans that begin in the block are below the one that is carried."""
    token = context.attach(propagate.extract(carrier))
    try:
        yield
    finally:
        context.detach(token)
