import json

import pyarrow as pa
import pytest

from serving.catalogue import Catalogue
from serving.collect import NoJson, check, events_of, parse
from warehouse.landing import NOTES_SCHEMA
from warehouse.time_algebra import DAY_US, MINUTE_US

NOW = 1_651_767_000_000_000  # 2022-05-05T16:10:00Z
CLICK = {"eventId": "e1", "eventType": "click", "userId": "u1", "noteId": "n1"}


@pytest.fixture(scope="module")
def catalogue():
    note = {"note_id": "n1", "author_id": "a1", "topics": [], "note_type": None, "duration_ms": None, "created_at": None}
    return Catalogue.from_tables(pa.Table.from_pylist([note], schema=NOTES_SCHEMA), {})


def test_a_click_becomes_a_row_with_the_servers_time_and_the_notes_author(catalogue):
    (checked,) = check([CLICK], catalogue, NOW)
    assert checked.error is None
    assert checked.row == {
        "event_id": "e1",
        "event_type": "click",
        "user_id": "u1",
        "note_id": "n1",
        "author_id": "a1",
        "surface": None,
        "request_id": None,
        "impression_id": None,
        "event_ts": NOW,
        "retracts": None,
        "properties": None,
    }


def test_a_retraction_names_the_event_that_it_takes_back_and_needs_no_note(catalogue):
    event = {"eventId": "r1", "eventType": "retraction", "userId": "u1", "retracts": "e1"}
    (checked,) = check([event], catalogue, NOW)
    assert checked.error is None
    assert (checked.row["event_type"], checked.row["retracts"], checked.row["note_id"]) == ("retraction", "e1", None)


def test_an_authors_own_id_and_time_are_kept_and_played_time_goes_into_properties(catalogue):
    event = CLICK | {"eventType": "watch", "watchMs": 1500, "authorId": "a9", "eventTs": "2022-05-05T18:09:00+02:00"}
    (checked,) = check([event | {"properties": {"mode": "loop"}}], catalogue, NOW)
    assert checked.row["author_id"] == "a9"
    assert checked.row["event_ts"] == NOW - MINUTE_US
    assert json.loads(checked.row["properties"]) == {"mode": "loop", "watch_ms": 1500}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"eventId": None}, "eventId: Input should be a valid string"),
        ({"eventId": ""}, "eventId: String should have at least 1 character"),
        ({"eventId": "e" * 257}, "eventId: String should have at most 256 characters"),
        ({"eventId": "a\u0000b"}, "eventId: String should match pattern"),
        ({"userId": "\ud800"}, "userId: Input should be a valid string"),
        ({"userId": 7}, "userId: Input should be a valid string"),
        ({"eventType": "clicked"}, "eventType: Input should be 'view', 'click'"),
        ({"eventType": "heartbeat"}, "eventType: Input should be 'view', 'click'"),
        ({"noteId": None}, "a click needs noteId"),
        ({"eventType": "watch"}, "a watch needs watchMs"),
        ({"watchMs": 5}, "watchMs belongs to a watch"),
        ({"eventType": "watch", "watchMs": -1}, "watchMs: Input should be greater than or equal to 0"),
        ({"eventType": "follow", "noteId": None}, "a follow needs authorId"),
        ({"eventTs": "yesterday"}, "eventTs must look like 2022-05-05T16:10:00Z"),
        ({"eventTs": "2022-05-05T16:10:00"}, "eventTs needs a zone"),
        ({"eventTs": "2022-05-05T16:21:00Z"}, "eventTs is more than 10 minutes ahead"),
        ({"eventTs": "2022-04-28T16:09:59Z"}, "eventTs is more than 7 days ago"),
        ({"properties": {"x": float("nan")}}, "properties must be JSON"),
        ({"properties": {"x": "y" * 9000}}, "properties may take 8192 bytes"),
        ({"properties": [1]}, "properties: Input should be a valid dictionary"),
        ({"properties": {"watch_ms": 4}}, "milliseconds played go into watchMs"),
        ({"user_id": "u1"}, "user_id: is not a field here; names are camelCase"),
        ({"retracts": "e0"}, "retracts belongs to a retraction, not to a click"),
        ({"eventType": "retraction"}, "a retraction needs retracts"),
        ({"eventType": "retraction", "retracts": ""}, "retracts: String should have at least 1 character"),
    ],
)
def test_what_is_wrong_with_an_event_is_said_in_a_sentence(catalogue, change, said):
    (checked,) = check([CLICK | change], catalogue, NOW)
    assert checked.row is None
    assert said in checked.error


@pytest.mark.parametrize("event", [None, 5, "click", [CLICK], True])
def test_what_is_no_object_is_no_event(catalogue, event):
    (checked,) = check([event], catalogue, NOW)
    assert "valid dictionary" in checked.error


def test_one_bad_event_leaves_the_others_alone(catalogue):
    checked = check([CLICK, {"eventId": "e2"}, CLICK | {"eventId": "e3"}], catalogue, NOW)
    assert [one.event_id for one in checked] == ["e1", "e2", "e3"]
    assert [one.row is not None for one in checked] == [True, False, True]


def test_limits_on_time_are_inclusive(catalogue):
    for edge in ("2022-05-05T16:20:00Z", "2022-04-28T16:10:00Z"):
        (checked,) = check([CLICK | {"eventTs": edge}], catalogue, NOW)
        assert checked.error is None
    assert NOW - check([CLICK | {"eventTs": "2022-04-28T16:10:00Z"}], catalogue, NOW)[0].row["event_ts"] == 7 * DAY_US


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([CLICK], "got a JSON list"),
        ("click", "got a JSON string"),
        (None, "got a JSON null"),
        ({"events": []}, "1 to 1000 events"),
        ({"events": {}}, "1 to 1000 events"),
        ({"events": [CLICK] * 1001}, "1 to 1000 events"),
        ({"events": [CLICK], "userId": "u"}, "beside events the body holds 'userId'"),
    ],
)
def test_a_body_of_another_shape_is_refused(body, said):
    with pytest.raises(ValueError, match=said):
        events_of(body)


def test_a_body_is_one_event_or_a_list_of_them():
    assert events_of(CLICK) == [CLICK]
    assert events_of({"events": [CLICK, 5]}) == [CLICK, 5]


def test_ndjson_is_one_event_a_line_and_a_line_that_is_none_stays_alone():
    body = b'{"eventId": "e1"}\n\n{"eventId": \r\n[' + b"[" * 100_000 + b'\n\xff\n{"eventId": "e2"}'
    first, half, deep, bytes_only, last = parse(body, "application/x-ndjson; charset=utf-8")
    assert (first, last) == ({"eventId": "e1"}, {"eventId": "e2"})
    assert all(isinstance(line, NoJson) for line in (half, deep, bytes_only))
    assert half.text == '{"eventId": '
    assert half.error.startswith("the line must be JSON: Expecting value")


@pytest.mark.parametrize("body", [b"", b"\n \n", b"{}\n" * 1001])
def test_ndjson_of_no_lines_or_too_many_is_refused(body):
    with pytest.raises(ValueError, match="1 to 1000 lines"):
        parse(body, "application/x-ndjson")


def test_what_is_refused_becomes_a_dead_letter_with_its_reason(catalogue):
    bad, line = check([CLICK | {"noteId": None}, NoJson("the line must be JSON: x", "{")], catalogue, NOW)
    assert "a click needs noteId" in bad.letter().reason
    assert json.loads(bad.letter().payload) == CLICK | {"noteId": None}
    assert (line.letter().reason, line.letter().payload) == ("the line must be JSON: x", "{")
