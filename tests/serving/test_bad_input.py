"""Whatever a client sends: 4xx with a sentence, or a sensible page. Never 5xx, never NaN."""

import json

import httpx
import pytest

from serving.wire import FeedRequest

FEED, L1, L2, RETRIEVE, EVENTS = "/v1/feed", "/v1/rank/l1", "/v1/rank/l2", "/v1/retrieve", "/v1/events"
CLICK = {"eventId": "bad-1", "eventType": "click", "userId": "u1", "noteId": "n1"}
MANY = [{"noteId": f"x{n}"} for n in range(10_001)]

REFUSED = [
    # path, body, status, what the answer says
    (FEED, {}, 422, "userId: Field required"),
    (FEED, {"userId": ""}, 422, "userId: String should have at least 1 character"),
    (FEED, {"userId": None}, 422, "userId: Input should be a valid string"),
    (FEED, {"userId": 17}, 422, "userId: Input should be a valid string"),
    (FEED, {"userId": "u" * 257}, 422, "userId: String should have at most 256 characters"),
    (FEED, {"userId": "a\nb"}, 422, "userId: String should match pattern"),
    (FEED, {"user_id": "u1"}, 422, "user_id: is not a field here; names are camelCase"),
    (FEED, {"userId": "u1", "feedType": "explore"}, 422, "feedType: Input should be 'EXPLORE', 'FOLLOW' or 'NEARBY'"),
    (FEED, {"userId": "u1", "limit": 0}, 422, "limit: Input should be greater than or equal to 1"),
    (FEED, {"userId": "u1", "limit": 201}, 422, "limit: Input should be less than or equal to 200"),
    (FEED, {"userId": "u1", "limit": 2.5}, 422, "limit: Input should be a valid integer"),
    (FEED, {"userId": "u1", "limit": "many"}, 422, "limit: must be a number, got text"),
    (FEED, {"userId": "u1", "context": 5}, 422, "context: Input should be a valid dictionary"),
    (FEED, [], 422, "body"),
    (FEED, None, 422, "body"),
    (RETRIEVE, {"userId": "u1", "limit": -1}, 422, "limit"),
    (L1, {"userId": "u1"}, 422, "candidates: Field required"),
    (L1, {"userId": "u1", "candidates": [{}]}, 422, "candidates.0.noteId: Field required"),
    (L1, {"userId": "u1", "candidates": "n1"}, 422, "candidates: Input should be a valid list"),
    (L1, {"userId": "u1", "candidates": [{"noteId": "n1", "recallScore": "high"}]}, 422, "recallScore"),
    (L1, {"userId": "u1", "candidates": [], "topK": 0}, 422, "topK"),
    (L1, {"userId": "u1", "candidates": MANY}, 422, "candidates: at most 10000 at once, got 10001"),
    (L2, {"userId": "u1", "candidates": MANY}, 422, "candidates: at most 10000 at once, got 10001"),
    (EVENTS, {}, 422, "eventId: Field required"),
    (EVENTS, [CLICK], 422, "got a JSON list"),
    (EVENTS, {"events": []}, 422, "1 to 1000 events"),
    (EVENTS, CLICK | {"eventType": "heartbeat"}, 422, "eventType: Input should be 'view'"),
    (EVENTS, CLICK | {"eventTs": "2199-01-01T00:00:00Z"}, 422, "more than 10 minutes ahead"),
    (EVENTS, {"events": [CLICK | {"userId": 5}]}, 422, "userId: Input should be a valid string"),
]


@pytest.mark.parametrize(("path", "body", "status", "said"), REFUSED)
def test_a_bad_body_is_refused_with_what_would_be_right(server, path, body, status, said):
    answer = server.post(path, body)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["detail"]
    assert len(answer.text) < 5000


READ_AT_ONCE = [
    b'{"userId": "u1", "context": {"a": 12345678901234567890123, "b": 1e999, "c": -0.0, "d": true, "e": [null, {}], "f": NaN}}',
    b'{"userId": "u1", "userId": "u2", "limit": 5.0, "deadlineMs": 7}',
    b' {"userId": "\\u00e9\\ud83d\\ude00", "context": {"surface": null, "geohash": "u0yjj"}, "deadlineMs": 0.1e2}\n',
    b'{"userId": "u1", "deadlineMs": 123.45678901234567, "context": {"a": 0.1, "b": 5e-324, "c": 1.7976931348623157e308}}',
]
LEFT_TO_THE_FRAMEWORK = [
    b"\xef\xbb\xbf{}",
    '{"userId": "u1"}'.encode("utf-16"),
    b'{"userId": "\\ud800"}',
    b'{"userId": "u1"} 5',
    b"{'userId': 1}",
]


@pytest.mark.parametrize("body", READ_AT_ONCE)
def test_what_is_read_at_once_is_what_the_framework_reads(body):
    at_once = FeedRequest.model_validate_json(body)
    assert repr(at_once) == repr(FeedRequest.model_validate(json.loads(body)))


@pytest.mark.parametrize("body", [*READ_AT_ONCE, *LEFT_TO_THE_FRAMEWORK])
def test_a_feed_is_answered_alike_whichever_way_it_is_read(server, body):
    ways = "application/json", "application/json; charset=utf-8"
    one, other = (server.client.post(FEED, content=body, headers={"Content-Type": way}) for way in ways)
    assert one.status_code == other.status_code
    assert one.json().get("errors") == other.json().get("errors")
    assert len(one.json().get("notes", ())) == len(other.json().get("notes", ()))


RAW = [
    (b"", 422),
    (b"{", 422),
    (b"\xff\xfe{}", 400),
    (b'{"userId": "\xc3\x28"}', 400),
    (b'{"userId": "\\ud800"}', 422),
    (b'{"userId": "u1", "limit": NaN}', 422),
    (b'{"userId": "u1", "limit": 1e999}', 422),
    (b'{"userId": "u1", "limit": ' + b"9" * 5000 + b"}", 400),
    (b"[" * 100_000, 400),
    (b'"userId"', 422),
]


@pytest.mark.parametrize("path", [FEED, RETRIEVE, L1, L2, EVENTS])
@pytest.mark.parametrize(("body", "status"), RAW)
def test_bytes_that_are_no_json_are_refused(server, path, body, status):
    answer = server.client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["detail"]


def test_numbers_that_are_none_are_refused_in_scores(server):
    for number in (b"NaN", b"Infinity", b"-Infinity"):
        body = b'{"userId": "u1", "candidates": [{"noteId": "n1", "recallScore": ' + number + b"}]}"
        answer = server.client.post(L1, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422
        assert "finite number" in answer.json()["detail"]


def test_a_huge_body_is_refused_whether_it_says_so_or_not(server):
    body = json.dumps({"userId": "u1", "candidates": [{"noteId": "n" * 200}] * 100_000}).encode()
    told = server.client.post(L1, content=body, headers={"Content-Type": "application/json"})
    assert told.status_code == 413
    assert "larger than 4194304 bytes" in told.json()["detail"]
    pieces = (body[start : start + 65536] for start in range(0, len(body), 65536))
    try:
        chunked = server.client.post(L1, content=pieces, headers={"Content-Type": "application/json"})
    except (httpx.WriteError, httpx.ReadError):
        return  # the server closed the line before all of it was sent
    assert chunked.status_code == 413


@pytest.mark.parametrize("user_id", ["ünïcødé", "汉字", "😀", "../../etc/passwd", "' or 1=1 --", "a b", "u" * 256])
def test_any_name_is_a_reader(server, user_id):
    answer = server.feed(user_id)
    assert len(answer["notes"]) == 20


def test_paths_and_methods_that_are_not_there(server):
    assert server.get("/v1/nothing").status_code == 404
    assert "/docs lists what is" in server.get("/v1/nothing").json()["detail"]
    assert server.get(FEED).status_code == 405
    assert server.get("/v1/explain/none").status_code == 404
    assert "no request 'none'" in server.get("/v1/explain/none").json()["detail"]


def test_explaining_a_note_that_was_no_candidate_says_why(server, readers):
    request_id = server.feed(readers[0])["requestId"]
    seen = server.engine.world.readers.seen(readers[0])[-1]
    for note_id, why in ((seen, "the reader had seen it"), ("unheard-of", "it is not a known note")):
        answer = server.get(f"/v1/explain/{request_id}", params={"noteId": note_id})
        assert answer.status_code == 404
        assert why in answer.json()["detail"]


def test_of_a_batch_the_good_are_taken_and_the_bad_are_told(server):
    events = [
        CLICK | {"eventId": "batch-1"},
        CLICK | {"eventId": "batch-2", "eventType": "clicked"},
        "x",
        CLICK | {"eventId": "batch-3"},
    ]
    answer = server.post(EVENTS, {"events": events})
    assert answer.status_code == 207
    told = answer.json()
    assert (told["accepted"], told["rejected"]) == (2, 2)
    assert [result["status"] for result in told["results"]] == ["accepted", "rejected", "rejected", "accepted"]
    assert [result["eventId"] for result in told["results"]] == ["batch-1", "batch-2", None, "batch-3"]
    assert "eventType" in told["results"][1]["error"]
    assert told["results"][3]["offset"] == told["results"][0]["offset"] + 1


def test_no_answer_of_this_module_was_a_server_error(server):
    lines = server.get("/metrics").text.splitlines()
    assert [line for line in lines if 'status="5' in line and 'route="/readyz"' not in line] == []
