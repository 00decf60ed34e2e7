"""OpenTelemetry spans of a request's stages, below the span that FastAPI makes of the request.

Without an SDK they cost a function call and go nowhere. They are sent where OTEL_EXPORTER_OTLP_ENDPOINT says, if the extra
`telemetry` is installed, or where a provider that the launcher sets sends them. No span holds a reader's id, and FastAPI's own
log records are off: they hold what was in a body that it refused.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fastapi.telemetry import TelemetryConfig
from opentelemetry import context, propagate, trace

CANDIDATES, REQUEST_ID, DEGRADED = "headrace.candidates", "headrace.request_id", "headrace.degraded"
"""Attributes of spans: how many candidates a stage had, the id of the answer, what was left out of it."""
tracer = trace.get_tracer("headrace.serving")
OF_FASTAPI: TelemetryConfig = {"auto_configure": True, "operation_spans": False, "metrics": False, "logs": False}
"""Metrics are Prometheus's (`serving.metrics`)."""


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
