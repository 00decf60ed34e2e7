"""Starting, watching and stopping: what is missing is named, what was acknowledged survives, one home has one server."""

import os
import socket
import subprocess
import sys
import threading
import time
from datetime import datetime

import httpx
import pytest

from serving.app import create_app
from serving.forward_log import FORWARD_LOG
from serving.settings import Settings
from tests.serving.hand_made import free_port, running
from warehouse.clock import Clock
from warehouse.home import Home


def headrace(home, *words, timeout_s=120):
    environment = {**os.environ, "HEADRACE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "headrace.cli", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)


def test_status_says_where_the_server_stands(server):
    status = server.get("/v1/status").json()
    assert status["ready"] is True
    assert status["notes"] == len(server.engine.world.catalogue)
    assert all(known >= 0 for known in status["position"])
    assert datetime.fromisoformat(status["tick"]) <= datetime.fromisoformat(status["clock"])
    assert set(status["featureGroups"]) == {"note_engagement", "author_engagement", "user_activity", "user_author_affinity"}
    assert set(status["forwardLog"]) == {"written", "waiting", "dropped", "failedWrites"}


def test_metrics_count_requests_stages_and_the_queue(server):
    server.feed("counted")
    text = server.get("/metrics").text
    for line in (
        'headrace_http_requests_total{route="/v1/feed",status="200"}',
        'headrace_stage_seconds_bucket{le="0.04",stage="l2"}',
        "headrace_forward_log_dropped 0.0",
        "headrace_ready 1.0",
        "headrace_tick_age_seconds",
        "process_cpu_seconds_total",
        f'headrace_model_info{{model="l2",version="{server.engine.world.models.versions["l2"]}"}} 1.0',
    ):
        assert line in text


def test_the_description_of_the_api_names_every_route(server):
    paths = server.get("/openapi.json").json()["paths"]
    assert {
        "/v1/feed",
        "/v1/retrieve",
        "/v1/rank/l1",
        "/v1/rank/l2",
        "/v1/events",
        "/v1/explain/{request_id}",
        "/livez",
    } <= set(paths)
    feed = paths["/v1/feed"]["post"]
    assert set(feed["responses"]) >= {"200", "422", "503"}
    assert server.get("/docs").status_code == 200


def test_the_forward_log_holds_what_was_answered(server, readers):
    answer = server.feed(readers[4])
    from_memory = server.explain(answer["requestId"])
    assert server.engine.forward_log.flush()
    server.engine.recent._served.clear()
    from_lake = server.explain(answer["requestId"])
    assert from_lake == from_memory
    shown = sorted((one for one in from_lake["candidates"] if one["position"] is not None), key=lambda one: one["position"])
    assert [one["noteId"] for one in shown] == [note["noteId"] for note in answer["notes"]]
    for logged, note in zip(shown, answer["notes"], strict=True):
        for name in ("impressionId", "authorId", "sources", "recallScore", "l1Score", "predictions", "finalScore"):
            assert logged[name] == note[name]
        assert logged["stageReached"] == "shown"
        assert logged["features"]
    stages = {one["stageReached"] for one in from_lake["candidates"]}
    assert stages == {"shown", "l1", "l2"}


def test_an_empty_home_answers_503_with_the_way_out(tmp_path):
    with running(create_app(Home(tmp_path), Clock(), Settings.load())) as server:
        assert server.get("/livez").json() == {"status": "alive"}
        assert not server.engine.wait(30)
        answer = server.get("/readyz")
        assert answer.status_code == 503
        assert any("has no events; run `headrace land" in part for part in answer.json()["missing"])
        assert any("model l2 is not published; run `headrace train all`" in part for part in answer.json()["missing"])
        feed = server.post("/v1/feed", {"userId": "u1"})
        assert feed.status_code == 503
        assert "headrace land" in feed.json()["detail"]
        assert server.get("/v1/status").json()["ready"] is False
        assert server.get("/ui").status_code == 200


def test_serving_an_empty_home_ends_with_2_and_the_way_out(tmp_path):
    done = headrace(tmp_path, "serve", "--port", str(free_port()))
    assert done.returncode == 2, done.stderr
    assert "run `headrace land" in done.stderr
    assert "headrace train all" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_ends_with_2_and_the_port(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = headrace(tmp_path, "serve", "--port", str(port))
    assert done.returncode == 2, done.stderr
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another with --host or --port" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--port", "99999"), "--port must be between 1 and 65535"),
        (("--workers", "0"), "--workers must be between 1 and 64"),
    ],
)
def test_what_serve_cannot_do_is_said(tmp_path, words, said):
    done = headrace(tmp_path, "serve", *words)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def test_parity_of_a_home_that_never_served_ends_with_2(tmp_path):
    done = headrace(tmp_path, "parity")
    assert done.returncode == 2, done.stderr
    assert "nothing was served yet" in done.stderr


def test_a_second_server_on_the_same_home_is_refused(server):
    with running(create_app(server.engine.home, server.engine.clock, server.engine.settings)) as second:
        assert not second.engine.wait(60)
        assert "another server runs on" in second.get("/readyz").json()["missing"][0]
    assert server.get("/readyz").status_code == 200


def test_nobody_is_told_that_it_is_ready_before_it_answers(small_home, monkeypatch):
    last, goes_on = threading.Event(), threading.Event()

    def held() -> int:
        last.set()
        goes_on.wait(60)
        return 0

    monkeypatch.setattr("serving.engine.collapse", held)
    with running(create_app(small_home, Clock(), Settings.load())) as server:
        assert last.wait(60)
        waited = server.engine.wait(0.05)
        assert (waited, server.get("/readyz").status_code) == (False, 503)
        goes_on.set()
        waited = server.engine.wait(60)
        assert (waited, server.get("/readyz").status_code) == (True, 200)


def test_what_was_acknowledged_is_there_after_a_restart(small_home):
    """The server runs as a process of its own and is stopped by a signal, as an operator would."""
    told = []
    for round_number in range(2):
        started_at = f"2022-04-26T01:{10 * round_number:02}:00Z"  # a replay clock starts over with its process
        environment = {
            **os.environ,
            "HEADRACE_HOME": str(small_home.path),
            "HEADRACE_CLOCK": started_at,
            "OMP_NUM_THREADS": "1",
        }
        port = free_port()
        command = [sys.executable, "-m", "headrace.cli", "serve", "--port", str(port)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
                _until_ready(client, process)
                if round_number == 0:
                    note = client.post("/v1/feed", json={"userId": "survivor"}).json()["notes"][0]["noteId"]
                    click = {"eventId": "before-the-stop", "eventType": "click", "userId": "survivor", "noteId": note}
                    told.append(client.post("/v1/events", json=click).json()["results"])
                else:
                    told.append(client.post("/v1/events", json=click).json()["results"])
                served = client.post("/v1/feed", json={"userId": "survivor"}).json()
                explained = client.get(f"/v1/explain/{served['requestId']}").json()
        finally:
            process.terminate()
            out, err = process.communicate(timeout=60)
        assert f"http://127.0.0.1:{port}/ui" in out
        assert "Traceback" not in err
        assert explained["userSequences"]["user_last_clicks_30d"] == [note]
        assert explained["userFeatures"]["user_num_clicks_7d"] == 1
        assert note not in [shown["noteId"] for shown in served["notes"]]
    assert told[0] == told[1]
    from warehouse.lake import Lake

    lake = Lake.open(small_home)
    assert lake.scan(FORWARD_LOG).num_rows == 3
    assert lake.scan("lake.events", "event_id == 'before-the-stop'").num_rows == 1


def _until_ready(client, process, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if (answer := client.get("/readyz")).status_code == 200:
                return
            state = answer.text
        except httpx.ConnectError as error:
            state = str(error)
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, state
        time.sleep(0.1)
