"""Spans and log lines of real requests: which stages, how many candidates, which request, and never who asked."""

import asyncio
import contextlib
import http.server
import io
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serving import logs, telemetry
from serving.budget import Budget
from serving.metrics import Metrics
from serving.workers import computed_for_another, to_hand_on
from tests.serving.hand_made import free_port

STAGES = ["hydrate_user", "retrieve", "hydrate_candidates", "l1", "l2", "policy"]
READER = "a-reader-who-has-a-name"


@pytest.fixture(scope="module")
def exporter():
    """One provider per process is all that OpenTelemetry allows; other tests do not look at it."""
    exporter = InMemorySpanExporter()
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


@pytest.fixture
def lines():
    """What is logged, as JSON lines."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logs.JsonLines())
    root, level = logging.getLogger(), logs.access.level
    root.addHandler(handler)
    logs.access.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in written.getvalue().splitlines()]
    root.removeHandler(handler)
    logs.access.setLevel(level)


def until(is_so, timeout_s=10.0):
    """A client has its answer a moment before the server ends the span and writes the line."""
    deadline = time.monotonic() + timeout_s
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_feed_is_one_trace_of_its_stages_with_their_candidates(server, readers, exporter):
    exporter.clear()
    sent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    asked = {"userId": readers[28], "context": {"geohash": "u0yjj"}}  # from where nobody asked before: no score is kept
    answer = server.post("/v1/feed", asked, headers=sent).json()
    until(lambda: "POST /v1/feed" in [span.name for span in exporter.get_finished_spans()])
    spans = {span.name.removeprefix("headrace."): span for span in exporter.get_finished_spans()}
    request, feed = spans.pop("POST /v1/feed"), spans["feed"]
    assert [name for name in spans if name != "feed"] == STAGES
    assert f"{request.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{request.parent.span_id:016x}" == "b7ad6b7169203331"
    assert feed.parent.span_id == request.context.span_id
    assert all(spans[stage].parent.span_id == feed.context.span_id for stage in STAGES)
    counts = {stage: spans[stage].attributes.get(telemetry.CANDIDATES) for stage in STAGES}
    assert counts["retrieve"] == counts["hydrate_candidates"] == counts["l1"] == feed.attributes[telemetry.CANDIDATES]
    assert counts["l2"] == counts["policy"] == min(100, counts["l1"])
    assert feed.attributes[telemetry.REQUEST_ID] == answer["requestId"]
    assert f'"{readers[28]}"' not in "".join(span.to_json() for span in (request, *spans.values()))


def test_a_feed_that_another_worker_computes_stays_in_its_trace(server, readers, exporter):
    with telemetry.tracer.start_as_current_span("asked") as asked:
        handed = to_hand_on(server.app, json.dumps({"userId": readers[27]}).encode(), Budget.of_ms(60_000))
    exporter.clear()
    asyncio.run(computed_for_another(server.app, Metrics(), handed))
    (feed,) = [span for span in exporter.get_finished_spans() if span.name == "headrace.feed"]
    assert (feed.context.trace_id, feed.parent.span_id) == (asked.context.trace_id, asked.context.span_id)


def test_log_lines_of_a_failing_stage_carry_the_request_and_not_the_reader(server, monkeypatch, lines):
    def torn(*given, **named):
        raise RuntimeError("scores torn")

    monkeypatch.setattr(server.engine.world.models.l1, "score_many", torn)
    answer = server.feed(READER, context={"surface": "tab1"})
    assert "l1" in answer["degraded"]
    until(lambda: any(line["logger"] == "headrace.access" for line in lines()))
    told = [line for line in lines() if line["request_id"] == answer["requestId"]]
    assert [(line["logger"], line["level"]) for line in told] == [("serving.rank", "ERROR"), ("headrace.access", "INFO")]
    assert "scores torn" in told[0]["exception"]
    assert {"route": "/v1/feed", "status": 200}.items() <= told[1].items()
    assert 0 < told[1]["ms"] < 60_000
    assert READER not in json.dumps(lines())


def test_requests_at_once_keep_their_ids_apart(server, readers, lines):
    ids = [server.feed(reader)["requestId"] for reader in readers[:5]]
    until(lambda: len(lines()) >= len(ids))
    assert [line["request_id"] for line in lines()] == ids
    assert logs.request_id.get() == logs.NONE


def test_text_lines_name_the_request_and_the_fields(capsys):
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        logs.configure("text", with_access=True)
        logs.access.info("answered", extra={"fields": {"status": 200}})
    finally:
        root.handlers[:], root.level = handlers, level
    assert capsys.readouterr().err.rstrip().endswith("INFO headrace.access [-]: answered status=200")


@contextlib.contextmanager
def collector():
    """An OTLP receiver: what was posted to it, by path."""
    received = queue.Queue()

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received.put((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *given):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    with listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", received
        listening.shutdown()


def test_a_provider_that_is_set_after_the_first_spans_gets_those_that_follow():
    script = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serving.request import Steps
from serving.telemetry import carried

with Steps().timed("before", 2) as span:
    assert span is trace.INVALID_SPAN and carried() == {}
exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
with Steps().timed("after", 3):
    assert list(carried()) == ["traceparent"]
(span,) = exporter.get_finished_spans()
print(span.name, dict(span.attributes))
"""
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert ran.stdout == "headrace.after {'headrace.candidates': 3}\n"


def test_spans_are_sent_where_the_environment_says(tmp_path):
    with collector() as (url, received):
        port = free_port()
        command = [sys.executable, "-m", "uvicorn", "serving.app:app", "--port", str(port), "--log-level", "warning"]
        where = {"HEADRACE_HOME": str(tmp_path), "OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        with subprocess.Popen(command, env={**os.environ, **where}) as running:
            try:
                until_alive(port)
                path, body = received.get(timeout=30)
            finally:
                running.terminate()
    assert path == "/v1/traces"
    assert b"GET /livez" in body


def until_alive(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/livez", trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError("the server did not start")
