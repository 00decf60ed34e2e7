"""OpenTelemetry spans of a request's stages, below the span that FastAPI makes of the request.

Without a provider they are not made. They are sent where OTEL_EXPORTER_OTLP_ENDPOINT says, if the extra
`telemetry` is installed, or where a provider that the launcher sets sends them. No span holds a reader's id, and FastAPI's own
log records are off: they hold what was in a body that it refused.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

from fastapi.telemetry import TelemetryConfig
from opentelemetry import context, propagate, trace

from serving.company import Path

P = ParamSpec("P")
Result = TypeVar("Result")
CANDIDATES, REQUEST_ID, DEGRADED = "headrace.candidates", "headrace.request_id", "headrace.degraded"
"""Attributes of spans: how many candidates a stage had, the id of the answer, what was left out of it."""
OF_FASTAPI: TelemetryConfig = {"auto_configure": True, "operation_spans": False, "metrics": False, "logs": False}
"""Metrics are Prometheus's (`serving.metrics`)."""
_NOWHERE = nullcontext(trace.INVALID_SPAN)
_LATER = trace.ProxyTracerProvider()


class _Tracer:
    """OpenTelemetry's tracer, once a provider is set; what it makes without one takes 5 us a span."""

    def __init__(self) -> None:
        self._sends = trace.get_tracer("headrace.serving")
        self._is_sent = False

    def start_as_current_span(self, name: str) -> AbstractContextManager[trace.Span]:
        return self._sends.start_as_current_span(name) if self.is_sent() else _NOWHERE

    def is_sent(self) -> bool:
        """Whether a provider is set, which none takes back. `trace.get_tracer_provider` reads the environment until one is."""
        if not self._is_sent:
            self._is_sent = not isinstance(_LATER.get_tracer("headrace.serving"), trace.ProxyTracer)
        return self._is_sent


tracer = _Tracer()


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
    if tracer.is_sent():
        propagate.inject(carrier)
    return carrier


@contextmanager
def below(carrier: Mapping[str, str]) -> Iterator[None]:
    """Spans that begin in the block are below the one that is carried."""
    if not carrier:
        yield
        return
    token = context.attach(propagate.extract(carrier))
    try:
        yield
    finally:
        context.detach(token)
