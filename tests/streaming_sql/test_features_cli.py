"""`headrace features get`: one entity's values now and then, and where they came from."""

import json

import pytest

from headrace.cli import main
from streaming_sql.open_log import open_log
from streaming_sql.read_features import read_at, read_now
from streaming_sql.settings import StreamSettings
from tests.serving.hand_made import build_features
from tests.streaming_sql.test_runner import GROUPS, START_US, World, click
from warehouse.clock import ManualClock
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import EVENTS
from warehouse.time_algebra import FIVE_MINUTES_US, SECOND_US


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Two clicks on n1 in blocks, one by u2 that only the log holds; the lake is built."""
    for name in ("HEADRACE_EVENT_LOG", "HEADRACE_STREAM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    world = World(Home(tmp_path), ManualClock(START_US)).open()
    world.runner.catch_up()
    world.post(click("c1"), click("c2", user_id="u2"))
    world.runner.step()
    world.clock.advance_us(2 * FIVE_MINUTES_US)
    world.post(click("c3", user_id="u2"))
    world.runner.step()
    world.clock.advance_us(2 * FIVE_MINUTES_US)
    world.runner.step()
    world.runner.flush()
    build_features(world.lake)
    world.post(click("c4", user_id="u2", note_id="n2"))
    monkeypatch.setenv("HEADRACE_CLOCK", "2022-05-05T16:20:01Z")
    yield world
    world.crash()


def get(capsys, *words):
    capsys.readouterr()
    assert main(["features", "get", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_now_holds_what_only_the_log_has_and_names_blocks_and_events(world, capsys):
    (user,) = get(capsys, "--entity", "user=u2", "--explain")
    assert (user["group"], user["tick"]) == ("user_activity", "2022-05-05T16:15:00.000Z")
    assert user["values"]["user_num_clicks_1h"] == 3
    assert user["sequences"]["user_last_clicks_30d"] == ["n1", "n1", "n2"]
    assert [block["block_start"] for block in user["blocks"]] == ["2022-05-05T16:00:00.000Z", "2022-05-05T16:10:00.000Z"]
    assert [event["event_id"] for event in user["head"]] == ["c4"]
    assert user["position"] == list(world.log.end())


def test_a_reader_beside_a_server_writes_nothing(world, capsys):
    before = (world.log.end(), world.lake.table(EVENTS).metadata_location)
    get(capsys, "--entity", "note=n1")
    assert (world.log.end(), world.lake.table(EVENTS).metadata_location) == before


def test_then_is_what_was_known_then(world, capsys):
    (note,) = get(capsys, "--entity", "note_id=n1", "--at", "2022-05-05T16:15:31Z", "--explain")
    assert (note["tick"], note["values"]["note_num_clicks_1h"], len(note["blocks"])) == ("2022-05-05T16:15:00.000Z", 3, 2)
    (earlier,) = get(capsys, "--entity", "note=n1", "--at", "2022-05-05T16:15:29Z", "--explain")
    assert (earlier["tick"], earlier["values"]["note_num_clicks_1h"], len(earlier["blocks"])) == (
        "2022-05-05T16:10:00.000Z",
        2,
        1,
    )
    (user,) = get(capsys, "--entity", "user=u2", "--at", "2022-05-05T16:10:01Z", "--explain")
    assert (user["values"]["user_num_clicks_1h"], [event["event_id"] for event in user["head"]]) == (2, ["c3"])


def test_now_and_then_agree_where_both_can_answer(world):
    t_us = world.clock.now_us()
    groups, home = GROUPS, world.home
    world.clock.advance_us(FIVE_MINUTES_US - t_us % FIVE_MINUTES_US)
    for entity in ({"note_id": "n1"}, {"author_id": "a1"}, {"user_id": "u1", "author_id": "a1"}):
        now = read_now(home, world.clock, StreamSettings.from_env(), groups, entity)
        then = read_at(world.lake, groups, entity, now[0].tick_us + 40 * SECOND_US)
        assert [(one.tick_us, one.values, one.sequences) for one in now] == [(o.tick_us, o.values, o.sequences) for o in then]
        assert [[b["block_start"] for b in one.blocks] for one in now] == [[b["block_start"] for b in o.blocks] for o in then]


def test_it_prints_a_table_with_watermark_and_known_at(world, capsys):
    assert main(["features", "get", "--entity", "user=u1,author=a1", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "user_author_affinity of u1, a1" in out
    assert "watermark 2022-05-05T16:15:00.000Z, known at 2022-05-05T16:15:00.000Z" in out
    assert "blocks: 1" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--entity", "note"), "--entity is KEY=ID"),
        (("--entity", "song=s1"), "no feature group has the keys song_id; there are author=…; note=…; user=…; user=…,author=…"),
        (("--entity", "note=n1", "--at", "yesterday"), "--at must look like 2022-05-05T16:10:00Z"),
        (("--entity", "note=n1", "--at", "2023-05-05T16:10:00Z"), "has not come yet"),
        (("--entity", "note=n1", "--at", "2022-05-05T16:20:00.9Z"), None),
    ],
)
def test_what_is_wrong_is_said(world, capsys, words, said):
    if said is None:
        assert main(["features", "get", *words]) == 0
        return
    assert main(["features", "get", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_tick_that_is_not_built_is_refused(world, capsys, monkeypatch):
    monkeypatch.setenv("HEADRACE_CLOCK", "2022-05-05T18:00:00Z")
    assert main(["features", "get", "--entity", "note=n1", "--at", "2022-05-05T17:30:00Z"]) == 2
    assert "run `dbt build`" in capsys.readouterr().err
    empty = Home(world.home.path / "empty")
    log = open_log(empty, Lake.open(empty), world.clock, StreamSettings.from_env())
    log.close()
    (note,) = read_now(empty, world.clock, StreamSettings.from_env(), GROUPS, {"note_id": "n1"})
    assert note.values["note_num_clicks_1h"] == 0
