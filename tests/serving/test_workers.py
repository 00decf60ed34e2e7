"""A server of two processes: what one is told counts in the other, what one knows the other tells, and either may be killed."""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from serving.budget import Budget
from serving.cores import share_of
from serving.engine import Engine
from serving.metrics import Metrics, of_workers
from serving.peers import Peers
from serving.seat import take_seat
from serving.settings import Settings
from serving.sharing import Sharing
from serving.workers import computed_for_another, seated, to_hand_on
from tests.serving.hand_made import free_port, furnish
from warehouse.clock import Clock
from warehouse.errors import HeadraceError
from warehouse.home import Home
from warehouse.lake import Lake


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(home, its two workers' port)."""
    home, port = Home(tmp_path_factory.mktemp("home")), free_port()
    furnish(home, num_users=180, num_notes=120, days=1)
    settings = {"HEADRACE_HOME": str(home.path), "HEADRACE_CLOCK": "2022-04-26T01:00:00Z", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "headrace.cli", "serve", "--workers", "2", "--port", str(port)]
    process = subprocess.Popen(command, env=os.environ | settings, stderr=subprocess.PIPE, text=True)
    try:
        until_all_ready(port, process)
        yield home, port
    finally:
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (0, False), err


def client(port):
    """A connection of its own, so that either worker may be the one that answers."""
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0, trust_env=False)


def get(port, path):
    with client(port) as one:
        return one.get(path)


def post(port, path, body):
    with client(port) as one:
        return one.post(path, json=body)


def post_while_it_dies(port, path, body):
    """A connection that the kernel has given to a process that is being killed is reset; the client's next is not."""
    for _ in range(50):
        try:
            return post(port, path, body)
        except (httpx.NetworkError, httpx.RemoteProtocolError):
            time.sleep(0.1)
    return post(port, path, body)


def workers_of(port):
    return get(port, "/v1/status").json()["workers"]


def until_all_ready(port, process=None, timeout_s=180.0):
    deadline = time.monotonic() + timeout_s
    while True:
        assert process is None or process.poll() is None, process.communicate()
        try:
            workers = workers_of(port)
            if [(one["worker"], one["ready"]) for one in workers] == [(0, True), (1, True)]:
                return workers
        except httpx.HTTPError:
            workers = None
        assert time.monotonic() < deadline, workers
        time.sleep(0.2)


class EndsBetween(Engine):
    """Whose loading goes on while it is waited for, and has ended when it is looked at."""

    def wait(self, timeout_s):
        return super().wait(0.0)

    @property
    def is_loading(self):
        self._loader.join()
        return super().is_loading


@pytest.mark.parametrize("is_furnished", [True, False])
def test_a_worker_whose_loading_ends_just_after_a_wait_starts_or_says_what_is_missing(tmp_path, is_furnished):
    home = Home(tmp_path / "home")
    if is_furnished:
        furnish(home, num_users=180, num_notes=120, days=1)
    engine = EndsBetween(home, Clock(), Settings.load(), server="7")
    engine.start()

    async def seat_and_leave():
        await (await seated(engine, Metrics())).close()

    try:
        if is_furnished:
            asyncio.run(seat_and_leave())
        else:
            with pytest.raises(HeadraceError, match="no events"):
                asyncio.run(seat_and_leave())
    finally:
        engine.stop()


def test_one_leads_and_both_stand_at_the_same_tick(two):
    workers = until_all_ready(two[1])
    assert [one["leads"] for one in workers].count(True) == 1
    assert len({one["pid"] for one in workers}) == 2
    assert len({one["tick"] for one in workers}) == 1
    mapped = {one["leads"]: Path(f"/proc/{one['pid']}/maps").read_text().count("/online/store/layer-") for one in workers}
    assert mapped[False] > mapped[True]  # what follows reads the very files that the leader made


@pytest.mark.skipif(sys.platform != "linux", reason="threads are kept to cores on Linux only")
def test_each_keeps_to_its_own_cores_and_what_it_logs_is_written_on_any(two):
    _, port = two
    workers = until_all_ready(port)
    for _ in range(40):  # each answers some, and starts its log's writer
        post(port, "/v1/feed", {"userId": "u1"})
    allowed = os.sched_getaffinity(0)
    for one in workers:
        threads = [int(name) for name in os.listdir(f"/proc/{one['pid']}/task")]
        assert {frozenset(os.sched_getaffinity(thread)) for thread in threads} == {
            frozenset(share_of(one["worker"], 2, allowed))
        }
    deadline = time.monotonic() + 60
    while len(writers := [pid for one in workers for pid in children_of(one["pid"])]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert [os.sched_getaffinity(pid) for pid in writers] == [allowed, allowed]


def children_of(pid):
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def test_what_one_worker_is_told_counts_in_both(two):
    _, port = two
    shown = post(port, "/v1/feed", {"userId": "teller"}).json()["notes"]
    events = [
        {"eventId": "told-hide", "eventType": "hide", "userId": "teller", "noteId": shown[0]["noteId"]},
        {"eventId": "told-click", "eventType": "click", "userId": "teller", "noteId": shown[1]["noteId"]},
    ]
    assert post(port, "/v1/events", {"events": events}).status_code == 202
    ends = get(port, "/v1/status").json()["logEnd"]
    deadline = time.monotonic() + 10
    while not all(all(at >= end for at, end in zip(one["position"], ends, strict=True)) for one in workers_of(port)):
        assert time.monotonic() < deadline, workers_of(port)
    answering = set()
    for _ in range(200):
        with client(port) as one:
            answer = one.post("/v1/feed", json={"userId": "teller"}).json()
            answering.add(one.get("/v1/status").json()["worker"])
            explained = one.get(f"/v1/explain/{answer['requestId']}").json()
        assert not {note["noteId"] for note in answer["notes"]} & {shown[0]["noteId"], shown[1]["noteId"]}
        assert explained["userSequences"]["user_last_clicks_30d"] == [shown[1]["noteId"]]
        if answering == {0, 1}:
            return
    pytest.fail(f"200 connections, all answered by {answering}")


def computed_by(port, worker):
    label = f'headrace_stage_seconds_count{{stage="total",worker="{worker}"}} '
    return sum(float(line.removeprefix(label)) for line in get(port, "/metrics").text.splitlines() if line.startswith(label))


def test_feeds_that_would_wait_in_one_worker_are_computed_by_the_other(two):
    _, port = two
    until_all_ready(port)
    before = [computed_by(port, worker) for worker in (0, 1)]
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(client(port)) for _ in range(40)]
        of_first = [one for one in connections if one.get("/v1/status").json()["worker"] == 0]
        asked = [stack.enter_context(ThreadPoolExecutor(1)) for _ in of_first]
        answers = []
        for reader in range(5):
            waiting = [
                pool.submit(one.post, "/v1/feed", json={"userId": f"crowd-{reader}-{place}"})
                for place, (pool, one) in enumerate(zip(asked, of_first, strict=True))
            ]
            answers += [one.result() for one in waiting]
    assert len(of_first) > 1
    assert {(answer.status_code, len(answer.json()["notes"])) for answer in answers} == {(200, 20)}
    assert len({answer.json()["requestId"] for answer in answers}) == len(answers)
    after = [computed_by(port, worker) for worker in (0, 1)]
    assert sum(after) - sum(before) == len(answers)
    assert min(now - then for now, then in zip(after, before, strict=True)) >= 5
    handed_on = 'headrace_handed_on_requests_total{worker="0"} '
    assert f"{handed_on}{after[1] - before[1]}" in get(port, "/metrics").text
    for answer in answers[-3:]:
        assert get(port, f"/v1/explain/{answer.json()['requestId']}").json()["userId"].startswith("crowd-")


def test_a_feed_is_handed_back_by_a_worker_that_has_not_read_what_was_posted_where_it_was_asked(server, readers, monkeypatch):
    def computed():
        handed = to_hand_on(server.app, json.dumps({"userId": readers[26]}).encode(), Budget.of_ms(60_000))
        return asyncio.run(computed_for_another(server.app, Metrics(), handed))

    event = {
        "eventId": "posted-here",
        "userId": readers[26],
        "eventType": "like",
        "noteId": server.engine.world.catalogue.note_ids[0],
    }
    (posted,) = server.post("/v1/events", event).json()["results"]
    assert server.engine.told_position[posted["partition"]] == posted["offset"] + 1
    assert json.loads(computed())["notes"]
    with monkeypatch.context() as patch:
        ahead = list(server.engine.told_position)
        ahead[posted["partition"]] += 1_000_000
        patch.setattr(server.engine, "told_position", tuple(ahead))
        assert computed() == b""
    monkeypatch.setattr(server.engine, "settings", dataclasses.replace(server.engine.settings, waiting_requests=-10))
    assert computed() == b""  # it refuses more


def test_requests_go_to_whoever_has_least_and_come_back_from_one_that_died(tmp_path, caplog):
    async def shared():
        async def of_second(request):
            if request == b"no":
                raise ValueError("cannot")
            if request == b"hang":
                await asyncio.sleep(60)
            return b"second did " + request

        first, second, third = (Sharing(tmp_path, number, of_second) for number in range(3))
        assert first.less_busy(5) is None
        for one in (first, second, third):
            await one.listen()
        second.tell(1)
        third.tell(3)
        chosen = [first.less_busy(load) for load in (0, 1, 2, 4)]
        large = b"x" * 300_000
        answers = [await first.computed_by(1, request) for request in (b"this", large, b"no", b"that")]
        waiting = [asyncio.ensure_future(first.computed_by(1, b"this")) for _ in range(3)]
        await asyncio.sleep(0)
        while_three_are_out = first.less_busy(4), first.less_busy(3)
        assert await asyncio.gather(*waiting) == [b"second did this"] * 3
        assert await first.computed_by(1, b"hang", within_s=0.05) is None
        assert first.less_busy(3) is None  # until it tells again
        second.tell(1)
        await second.close()
        after_it_closed = first.less_busy(4), await first.computed_by(1, b"this")
        (tmp_path / "2.work").unlink()  # as one that was killed: it is counted, and does not answer
        third.tell(0)
        assert first.less_busy(1) == 2
        assert await first.computed_by(2, b"this") is None
        assert first.less_busy(1) is None
        await first.close()
        await third.close()
        return chosen, answers, while_three_are_out, after_it_closed

    chosen, answers, while_three_are_out, after_it_closed = asyncio.run(shared())
    assert "ValueError: cannot" in caplog.text
    assert chosen == [None, None, 1, 1]
    assert answers == [b"second did this", b"second did " + b"x" * 300_000, None, b"second did that"]
    assert while_three_are_out == (1, None)
    assert after_it_closed == (2, None)


def test_a_request_is_explained_by_whichever_worker_is_asked(two):
    _, port = two
    request_id = post(port, "/v1/feed", {"userId": "curious"}).json()["requestId"]
    assert {get(port, f"/v1/explain/{request_id}").status_code for _ in range(12)} == {200}
    assert get(port, "/v1/explain/never").status_code == 404


def test_metrics_are_of_both_each_with_its_number(two):
    text = get(two[1], "/metrics").text
    for worker in (0, 1):
        assert f'headrace_ready{{worker="{worker}"}} 1.0' in text
    assert text.count("# TYPE headrace_ready gauge") == 1
    assert 'headrace_http_requests_total{route="/v1/status",status="200",worker="' in text


@pytest.mark.parametrize("leads", [False, True])
def test_a_killed_worker_is_started_again_and_the_other_goes_on(two, leads):
    home, port = two
    (victim,) = [one for one in until_all_ready(port) if one["leads"] == leads]
    os.kill(victim["pid"], signal.SIGKILL)
    click = {"eventId": f"orphan-{leads}", "eventType": "click", "userId": f"orphan-{leads}", "noteId": "n1"}
    assert post_while_it_dies(port, "/v1/events", click).status_code == 202
    for _ in range(5):
        answer = post_while_it_dies(port, "/v1/feed", {"userId": f"orphan-{leads}"})
        assert (answer.status_code, len(answer.json()["notes"])) == (200, 20)
    again = until_all_ready(port)
    assert victim["pid"] not in [one["pid"] for one in again]
    assert [one["leads"] for one in again].count(True) == 1
    deadline = time.monotonic() + 60
    while Lake.open(home).scan("lake.events", f"event_id == 'orphan-{leads}'").num_rows != 1:
        assert time.monotonic() < deadline, "whoever leads now does not land"
        time.sleep(0.5)


def test_seats_of_one_server_and_none_for_another(tmp_path):
    leader = take_seat(tmp_path, "7")
    with pytest.raises(HeadraceError, match="before its leader was ready"):
        take_seat(tmp_path, "7", iter([False, False, True]).__next__)
    with pytest.raises(HeadraceError, match="another server runs on"):
        take_seat(tmp_path, None)
    leader.ready()
    follower = take_seat(tmp_path, "7")
    assert [(seat.leads, seat.number) for seat in (leader, follower)] == [(True, 0), (False, 1)]
    leader.leave()
    successor = take_seat(tmp_path, "7")
    assert (successor.leads, successor.number) == (True, 0)
    follower.leave()
    successor.leave()
    alone = take_seat(tmp_path, None)
    assert alone.leads
    alone.leave()


def test_a_peer_that_is_dead_is_left_out(tmp_path):
    async def asked() -> list[dict[int, bytes]]:
        first, second = (Peers(tmp_path / "ears", number, str.encode) for number in (0, 1))
        await first.listen()
        await second.listen()
        answers = [await first.ask("one?"), await second.ask("zero?")]
        await second.close()
        (tmp_path / "ears" / "2.sock").touch()  # what a killed one leaves
        answers.append(await first.ask("anybody?"))
        await first.close()
        return answers

    assert asyncio.run(asked()) == [{1: b"one?"}, {0: b"zero?"}, {}]


def test_merged_metrics_keep_what_each_says():
    text = '# HELP a_total what\n# TYPE a_total counter\na_total{x="1"} %d\n'
    assert of_workers({0: (text % 3).encode(), 1: (text % 4).encode()}).decode() == (
        '# HELP a_total what\n# TYPE a_total counter\na_total{worker="0",x="1"} 3.0\na_total{worker="1",x="1"} 4.0\n'
    )
