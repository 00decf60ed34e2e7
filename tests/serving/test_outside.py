"""Features of the request, of other services and of batch tables, from a request to training rows, with a real service that
answers, dawdles, lies, sends elsewhere and is not there."""

import contextlib
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.app import create_app
from serving.fetch import Fetcher, url_of, value_at
from serving.forward_log import FORWARD_LOG
from serving.parity import check_parity
from serving.settings import Settings
from tests.serving.hand_made import free_port, furnish, running, until_ready
from warehouse.features.declarations import load_groups
from warehouse.features.kinds.declared import HttpFeature, Kinds, RequestFeature, TableFeatures
from warehouse.features.kinds.values import Typed
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.training_export import EXAMPLES, export_training


class Service(BaseHTTPRequestHandler):
    """What the first word of the path says."""

    def do_GET(self) -> None:
        behaviour = self.path.split("/")[1]
        self.server.seen.append(self.path)  # type: ignore[attr-defined]
        if behaviour == "slow":
            self.server.released.wait(5)  # type: ignore[attr-defined]
        answers = {
            "good": (200, json.dumps({"score": {"value": 7.5}})),
            "slow": (200, json.dumps({"score": {"value": 1.0}})),
            "text": (200, json.dumps({"score": {"value": "7.5"}})),
            "garbage": (200, "<html>"),
            "elsewhere": (200, json.dumps({"points": 3})),
            "broken": (500, "{}"),
            "huge": (200, json.dumps({"score": {"value": 1.0}, "more": "x" * 100_000})),
            "moved": (302, ""),
        }
        status, body = answers[behaviour]
        self.send_response(status)
        if behaviour == "moved":
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/good/moved")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # who asked did not wait
            self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Not on the test's output."""


@pytest.fixture(scope="module")
def service():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.daemon_threads = True
    server.seen = []  # type: ignore[attr-defined]
    server.released = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.released.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()
    thread.join()


def called(name: str, url: str, timeout_ms: int = 2000) -> HttpFeature:
    return HttpFeature(Typed(name, "double", 0.5, (), ""), url, "score.value", timeout_ms, "here")


@pytest.mark.parametrize(
    ("behaviour", "failure"),
    [
        ("text", "must be a number"),
        ("garbage", "JSONDecodeError"),
        ("elsewhere", "KeyError"),
        ("broken", "status 500"),
        ("huge", "more than 65536 bytes"),
        ("moved", "status 302"),
    ],
)
def test_an_answer_that_is_not_right_is_the_default_and_says_why(service, behaviour, failure):
    fetcher = Fetcher([called("user_credit", f"http://127.0.0.1:{service.server_port}/{behaviour}/{{user_id}}")])
    try:
        one = fetcher.fetch({"user_id": "u1"})["user_credit"]
        assert (one.value, one.is_default) == (0.5, True)
        assert failure in one.failure
        assert f"/{behaviour}/u1" in service.seen
        assert "/good/moved" not in service.seen  # a redirect is not followed
    finally:
        fetcher.close()


def test_calls_go_out_together_and_none_outlives_its_time(service):
    host = f"http://127.0.0.1:{service.server_port}"
    features = [called(f"user_{place}", f"{host}/slow/{place}", timeout_ms=300) for place in range(6)]
    features += [called("user_dead", f"http://127.0.0.1:{free_port()}/x"), called("user_good", f"{host}/good/{{user_id}}")]
    fetcher = Fetcher(features)
    try:
        started = time.perf_counter()
        found = fetcher.fetch({"user_id": "a/../b?c"})
        assert time.perf_counter() - started < 1.2  # one after the other would be 1.8 s
    finally:
        fetcher.close()
    assert found["user_good"].value == 7.5
    assert not found["user_good"].is_default
    assert found["user_0"].failure == "no answer within 300 ms"
    assert "ConnectError" in found["user_dead"].failure
    assert "/good/a%2F..%2Fb%3Fc" in service.seen  # a key cannot leave its place


def test_a_call_without_its_key_is_not_made(service):
    fetcher = Fetcher([called("user_credit", f"http://127.0.0.1:{service.server_port}/good/{{surface}}")])
    try:
        before = len(service.seen)
        one = fetcher.fetch({"user_id": "u1", "surface": None})["user_credit"]
        assert (one.value, one.is_default, one.failure) == (0.5, True, None)
        assert len(service.seen) == before
    finally:
        fetcher.close()
    assert url_of("http://h/{a}", {"a": "x y"}) == "http://h/x%20y"
    assert value_at({"a": [{"b": 2}]}, "a[0].b") == 2


def kinds_of(service) -> Kinds:
    host = f"http://127.0.0.1:{service.server_port}"
    quality = (("quality", Typed("note_quality", "double", 0.5, (), "")),)
    mood = (("mood", Typed("user_mood", "bigint", None, (), "")),)
    return Kinds(
        tables=(
            TableFeatures("quality", "note", ("note_id",), "lake.quality", "at", "at", ("quality",), quality, "here"),
            TableFeatures("mood", "user", ("user_id",), "lake.mood", "at", "at", ("mood",), mood, "here"),
        ),
        request=(
            RequestFeature(Typed("request_device", "varchar", "phone", ("phone", "desktop"), ""), "device", "here"),
            RequestFeature(Typed("request_text_match", "double", None, (), ""), "text_match", "here"),
        ),
        http=(
            called("user_credit", f"{host}/good/{{user_id}}?on={{device}}"),
            called("user_late", f"{host}/slow/{{user_id}}", timeout_ms=50),
        ),
    )


@pytest.fixture(scope="module")
def served(service, clock, tmp_path_factory):
    """A server whose models were trained with these features among their inputs."""
    kinds = kinds_of(service)
    home = Home(tmp_path_factory.mktemp("outside") / "home")
    tables = [name for table in kinds.tables for name in table.feature_names]
    dataset = furnish(home, num_users=180, num_notes=120, days=1, more=[*kinds.served_inputs, *tables])
    lake = Lake.open(home)
    early = pa.array([dataset.events["landed_at"][0].as_py()], pa.timestamp("us", "UTC"))
    note_ids = dataset.notes["note_id"].to_pylist()
    notes = pa.table({"note_id": note_ids, "at": pa.concat_arrays([early] * len(note_ids)), "quality": [7.0] * len(note_ids)})
    for name, rows in (("quality", notes), ("mood", pa.table({"user_id": ["u1"], "at": early, "mood": [3]}))):
        lake.create(f"lake.{name}", rows.schema)
        lake.append(f"lake.{name}", rows)
    with running(create_app(home, clock, Settings.load(), kinds=kinds)) as server:
        until_ready(server)
        yield server


def test_what_the_caller_says_reaches_models_explanations_and_the_log(served, service):
    model = served.engine.world.models.l2
    assert {"request_device_is_desktop", "request_text_match", "user_credit", "user_late_is_default"} <= set(
        model.user_features
    )
    answer = served.feed("u1", context={"device": "desktop", "text_match": 0.25, "something": "else"})
    assert answer["notes"]
    assert answer["degraded"].count("http:user_late") == 1
    assert "http:user_credit" not in answer["degraded"]
    assert "/good/u1?on=desktop" in service.seen
    features = served.explain(answer["requestId"])["userFeatures"]
    expected = {
        "request_device_is_phone": 0.0,
        "request_device_is_desktop": 1.0,
        "request_text_match": 0.25,
        "user_credit": 7.5,
        "user_credit_is_default": 0.0,
        "user_late": 0.5,
        "user_late_is_default": 1.0,
    }
    assert {name: features[name] for name in expected} == expected
    assert 'headrace_degraded_total{what="http:user_late"}' in served.get("/metrics").text


def test_columns_of_a_batch_table_are_served_logged_and_found_again(served, service):
    answer = served.feed("u1")
    explained = served.explain(answer["requestId"])
    assert explained["userFeatures"]["user_mood"] == 3.0
    assert served.explain(served.feed("u9")["requestId"])["userFeatures"]["user_mood"] is None
    shown = [candidate["features"]["note_quality"] for candidate in explained["candidates"] if candidate["features"]]
    assert set(shown) == {7.0}
    assert served.engine.forward_log.flush()
    parity = check_parity(served.engine.lake, groups=load_groups(), kinds=kinds_of(service))
    assert parity.vectors_of_group["quality"] > 0
    assert parity.vectors_of_group["mood"] > 0
    assert not {"note_quality", "user_mood"} & set(parity.differences_of_feature)


def test_a_batch_table_that_is_loaded_again_is_read_again_and_shows_from_its_tick_on(served, service):
    world = served.engine.world
    tables, mood = world.tables, world.kinds.tables[1]
    tick_us = world.store.view().tick_us
    later = pa.array([tick_us + 60_000_000], pa.int64()).cast(pa.timestamp("us", "UTC"))
    served.engine.lake.append("lake.mood", pa.table({"user_id": ["u7"], "at": later, "mood": [5]}))
    tables.refresh(tick_us)
    assert np.isnan(tables.assemble(mood, [("u7",)], tick_us).values[0, 0])
    assert tables.assemble(mood, [("u7",)], tick_us + 300_000_000).values.tolist() == [[5.0]]
    assert tables.assemble(mood, [("u1",), (None,)], tick_us).values[0, 0] == 3.0


def test_what_the_caller_says_changes_scores(served):
    candidates = [{"noteId": note_id} for note_id in served.engine.world.catalogue.note_ids[:20]]

    def scores(**context):
        answer = served.post("/v1/rank/l2", {"userId": "u2", "candidates": candidates, "context": context})
        assert answer.status_code == 200, answer.text
        return [note["finalScore"] for note in answer.json()]

    assert scores(text_match=0.0) == scores(text_match=0.0)
    assert scores(text_match=0.0) != scores(text_match=40.0)


def test_nothing_said_is_the_empty_value(served):
    features = served.explain(served.feed("u3")["requestId"])["userFeatures"]
    assert features["request_device_is_phone"] == 1.0
    assert features["request_text_match"] is None


@pytest.mark.parametrize("route", ["/v1/feed", "/v1/rank/l1", "/v1/rank/l2"])
def test_a_wrong_type_is_a_400_that_names_the_key_and_what_is_right(served, route):
    body = {"userId": "u1", "context": {"device": "fridge"}} | (
        {} if route == "/v1/feed" else {"candidates": [{"noteId": "n1"}]}
    )
    answer = served.post(route, body)
    assert answer.status_code == 400
    assert answer.json()["detail"] == "context.device: request_device must be one of phone, desktop; got 'fridge'"


def test_training_rows_take_it_from_the_log_and_are_null_where_no_log_is(served, service, home_of_rows):
    answer = served.feed("u4", context={"device": "desktop", "text_match": 0.75})
    assert served.engine.forward_log.flush()
    shown = answer["notes"][0]["impressionId"]
    log = served.engine.lake.scan(FORWARD_LOG)
    lake = home_of_rows(log, [shown, "an impression of imported history"])
    export_training(lake, Home(lake.folder.parent), kinds_of(service))
    exported = lake.folder.parent / "exports" / "examples.parquet"
    manifest = json.loads(exported.with_name("manifest.json").read_text())
    assert manifest["files"]["examples.parquet"] == hashlib.sha256(exported.read_bytes()).hexdigest()
    rows = pq.read_table(exported).to_pylist()
    values = {
        row["impression_id"]: [row["request_device_is_desktop"], row["request_text_match"], row["user_credit"]] for row in rows
    }
    assert values == {shown: [1.0, 0.75, 7.5], "an impression of imported history": [None, None, None]}


@pytest.fixture
def home_of_rows(tmp_path, served):
    """A lake with this forward log and training examples of these impressions, shaped like the real ones."""

    def made(log: pa.Table, impressions: list[str]) -> Lake:
        lake = Lake.open(Home(tmp_path / "home"))
        lake.create(FORWARD_LOG, log.schema)
        lake.append(FORWARD_LOG, log)
        at = log["request_ts"][0].as_py()
        features = [name for group in load_groups().values() for name in group.feature_names]
        columns = {
            "impression_id": pa.array(impressions),
            "request_ts": pa.array([at] * len(impressions), pa.timestamp("us", "UTC")),
        }
        columns |= {name: pa.array([1.0] * len(impressions)) for name in (*features, "note_duration_ms", "note_age_min")}
        staged = pa.table({"event_ts": pa.array([at], pa.timestamp("us", "UTC")), "event_type": ["view"]})
        for name, rows in ((EXAMPLES, pa.table(columns)), ("staging.stg_engagements", staged)):
            lake.create(name, rows.schema)
            lake.append(name, rows)
        for name in ("lake.notes", "lake.users", "lake.events"):
            table = served.engine.lake.scan(name).slice(0, 1)
            lake.create(name, table.schema)
            lake.append(name, table)
        return lake

    return made
