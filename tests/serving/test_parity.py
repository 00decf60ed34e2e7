"""The promise on a small scale: what was served is what the lake says, and a value that is not is found and named."""

import json

import pytest

from serving.cli import main
from serving.forward_log import FORWARD_LOG, rows_to_table
from serving.parity import check_parity
from tests.serving.hand_made import build_features
from warehouse.lake import Lake
from warehouse.time_algebra import FIVE_MINUTES_US, GRACE_US, SECOND_US


@pytest.fixture(scope="module")
def served(server, clock, readers):
    """Feeds of busy and new readers between their own events, some taken back at once and some a tick later, over two ticks;
    then everything landed and built."""
    number = 0
    for _ in range(2):
        for reader in (*readers[10:12], "parity-newcomer"):
            for note in server.feed(reader)["notes"][:3]:
                clock.advance_us(700_001)
                for event_type in ("view", "click", "watch"):
                    number += 1
                    event = {"eventId": f"parity-{number}", "eventType": event_type, "userId": reader, "noteId": note["noteId"]}
                    answer = server.post("/v1/events", event | ({"watchMs": 900 + number} if event_type == "watch" else {}))
                    assert answer.status_code == 202
                for retracted in (number, number - 20):
                    back = {"eventId": f"parity-{number}-back-{retracted}", "eventType": "retraction", "userId": reader}
                    answer = server.post("/v1/events", back | {"retracts": f"parity-{retracted}"})
                    assert answer.status_code == 202
            clock.advance_us(30 * SECOND_US)
            server.feed(reader)
        clock.advance_us(FIVE_MINUTES_US)
        server.wait_for_tick()
    clock.advance_us(2 * FIVE_MINUTES_US + GRACE_US)
    server.wait_for_tick()
    assert server.engine.forward_log.flush()
    server.engine.runner.flush()
    lake = Lake.open(server.engine.home)
    build_features(lake)
    return lake


def test_every_logged_value_agrees_with_the_lake(served):
    parity = check_parity(served, last=6)
    assert parity.as_text().startswith(f"{parity.num_vectors:,} of {parity.num_vectors:,} logged feature vectors agree")
    assert parity.agrees, parity.as_text()
    assert parity.num_vectors >= 1_000
    assert parity.num_equal_values == parity.num_values > 20 * parity.num_vectors / 2
    assert set(parity.vectors_of_group) == {"note_engagement", "author_engagement", "user_activity", "user_author_affinity"}
    assert parity.vectors_of_group["user_activity"] == 6
    assert parity.skipped == {}


def test_the_command_prints_how_many_of_how_many(served, server, monkeypatch, capsys):
    monkeypatch.setenv("HEADRACE_HOME", str(server.engine.home.path))
    assert main(["parity", "--last", "2", "--min", "100"]) == 0
    assert "logged feature vectors agree with the lake" in capsys.readouterr().out
    assert main(["parity", "--json", "--last", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["requests"] == 1
    assert told["values"] == told["equalValues"] > 1_000
    assert main(["parity", "--last", "1", "--min", "10000000"]) == 1


def newest(lake):
    rows = lake.scan(FORWARD_LOG).sort_by([("request_ts", "descending"), ("request_id", "ascending")])
    row = rows.slice(0, 1).to_pylist(maps_as_pydicts="strict")[0]
    return row | {"candidates": [one for one in row["candidates"] if one["shown"]]}


class Altered:
    """The lake, with another forward log."""

    def __init__(self, lake, row):
        self._lake, self._rows = lake, rows_to_table([row])

    def __getattr__(self, name):
        return getattr(self._lake, name)

    def scan(self, name, *arguments, **more):
        return self._rows if name == FORWARD_LOG else self._lake.scan(name, *arguments, **more)


def test_one_wrong_count_is_found_and_named(served):
    row = newest(served)
    row["user_features"]["user_num_clicks_7d"] += 1
    parity = check_parity(Altered(served, row))
    assert not parity.agrees
    assert parity.num_values - parity.num_equal_values == 1
    assert parity.num_vectors - parity.num_equal_vectors == 1
    assert dict(parity.differences_of_feature) == {"user_num_clicks_7d": 1}
    assert f"user_num_clicks_7d of user_activity ({row['user_id']}) was served as" in parity.as_text()


@pytest.mark.parametrize(("relative", "agrees"), [(1e-12, True), (1e-6, False)])
def test_doubles_may_differ_by_rounding_and_no_more(served, relative, agrees):
    row = newest(served)
    features = next(one["features"] for one in row["candidates"] if one["features"] and one["features"]["note_avg_watch_ms_7d"])
    features["note_avg_watch_ms_7d"] *= 1 + relative
    assert check_parity(Altered(served, row)).agrees == agrees


def test_a_sequence_in_another_order_is_a_difference(served):
    row = newest(served)
    row["user_sequences"]["user_last_clicks_30d"] = row["user_sequences"]["user_last_clicks_30d"][::-1]
    assert len(row["user_sequences"]["user_last_clicks_30d"]) > 1
    assert dict(check_parity(Altered(served, row)).differences_of_feature) == {"user_last_clicks_30d": 1}


def test_null_where_a_value_belongs_is_a_difference(served):
    row = newest(served)
    row["user_features"]["user_num_views_7d"] = None
    assert dict(check_parity(Altered(served, row)).differences_of_feature) == {"user_num_views_7d": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"declarations_hash": "another"}, "features were defined otherwise"),
        ({"known_position": [10**9, 10**9]}, "events they had seen are not in the lake yet"),
    ],
)
def test_what_cannot_be_compared_is_counted_with_the_reason(served, change, reason):
    parity = check_parity(Altered(served, newest(served) | change))
    assert any(reason in told for told in parity.skipped)
    assert parity.agrees
