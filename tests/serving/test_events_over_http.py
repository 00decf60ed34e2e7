"""Posting events over HTTP: batches, NDJSON, partial failures, back-pressure, and where refused events end."""

import json
import threading

import pytest

from serving.intake import Intake
from warehouse.landing import DEAD_LETTERS

EVENTS = "/v1/events"


def click(event_id, **fields):
    return {"eventId": event_id, "eventType": "click", "userId": "poster", "noteId": "n1", **fields}


@pytest.fixture
def let_in(server):
    """Puts another intake in the server's place for one test."""
    own = server.app.state.intake
    yield lambda intake: setattr(server.app.state, "intake", intake)
    server.app.state.intake = own


def post_lines(server, *lines):
    return server.client.post(EVENTS, content="\n".join(lines).encode(), headers={"Content-Type": "application/x-ndjson"})


def test_ndjson_is_taken_line_by_line_and_what_is_refused_is_in_the_lake_with_its_reason(server):
    lines = [json.dumps(click("nd-1")), '{"eventId": "nd-2", ', json.dumps(click("nd-3", userId=7)), json.dumps(click("nd-4"))]
    answer = post_lines(server, *lines)
    assert answer.status_code == 207
    told = answer.json()
    assert [one["status"] for one in told["results"]] == ["accepted", "rejected", "rejected", "accepted"]
    assert "the line must be JSON" in told["results"][1]["error"]
    assert post_lines(server, lines[0], lines[3]).json()["results"] == [told["results"][0], told["results"][3]]
    assert post_lines(server, lines[0], lines[3]).status_code == 202
    server.engine.runner.flush()
    letters = {row["payload"]: row["reason"] for row in server.engine.lake.scan(DEAD_LETTERS).to_pylist()}
    assert "the line must be JSON" in letters[lines[1]]
    (reason,) = [reason for payload, reason in letters.items() if "nd-3" in payload]
    assert reason == told["results"][2]["error"]


def test_the_same_refused_event_again_is_one_letter(server):
    for _ in range(3):
        assert (
            server.client.post(EVENTS, content=b'{"eventId": "half', headers={"Content-Type": "application/json"}).status_code
            == 422
        )
        server.engine.runner.flush()
    payloads = server.engine.lake.scan(DEAD_LETTERS)["payload"].to_pylist()
    assert payloads.count('{"eventId": "half') == 1


def test_a_batch_above_the_limit_is_413_or_422(server):
    answer = server.client.post(EVENTS, content=b" " * 5_000_000, headers={"Content-Type": "application/x-ndjson"})
    assert answer.status_code == 413
    assert post_lines(server, *[json.dumps(click(f"many-{i}")) for i in range(1001)]).status_code == 422


def test_too_many_at_once_are_turned_away_with_retry_after_and_none_is_lost(server, let_in):
    let_in(Intake(most_waiting=40, most_log_bytes=2**40))
    answers, lock = {}, threading.Lock()

    def post(name):
        body = {"events": [click(f"storm-{name}-{i}", userId=f"storm-{name}") for i in range(30)]}
        answer = server.post(EVENTS, body)
        with lock:
            answers[name] = answer

    threads = [threading.Thread(target=post, args=(name,)) for name in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answer.status_code for answer in answers.values()) == {202, 429}
    away = [name for name, answer in answers.items() if answer.status_code == 429]
    assert answers[away[0]].headers["Retry-After"] == "1"
    assert "send them again" in answers[away[0]].json()["detail"]
    for name in away:
        post(name)
        assert answers[name].status_code == 202
    taken = {(one["partition"], one["offset"]) for answer in answers.values() for one in answer.json()["results"]}
    assert len(taken) == 12 * 30
    assert server.app.state.intake.num_waiting == 0


def test_a_log_that_is_too_large_turns_events_away(server, let_in):
    let_in(Intake(most_waiting=40, most_log_bytes=1))
    answer = server.post(EVENTS, click("too-large"))
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "5")
    assert "landing does not keep up" in answer.json()["detail"]


@pytest.mark.parametrize("num_events", [1, 100])
def test_one_batch_alone_is_always_let_in(num_events, server):
    intake = Intake(most_waiting=10, most_log_bytes=2**40)
    assert intake.why_not(num_events, server.engine.log) is None
    assert intake.why_not(10, server.engine.log) is not None
    intake.done(num_events)
    assert intake.why_not(10, server.engine.log) is None
