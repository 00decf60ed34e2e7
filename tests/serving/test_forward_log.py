import dataclasses
import io
import os
import signal
import threading
import time
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from serving.forward_log import (
    CODED_SCHEMA,
    FORWARD_LOG,
    FORWARD_LOG_SCHEMA,
    ForwardLog,
    commit_once,
    rows_to_table,
    write_once,
)
from serving.hydrate import CandidateFeatures
from serving.idle_time import can_return_from_idle
from serving.log_table import as_table, ordered_shares
from serving.log_writer import ENCODED_AT_ONCE, LogWriter, written
from warehouse.file_writer import FileWriter
from warehouse.home import Home
from warehouse.lake import Lake


def row(request_id="r1"):
    return {
        "request_id": request_id,
        "user_id": "u1",
        "feed_type": "EXPLORE",
        "request_ts": 1_650_000_000_000_001,
        "feature_watermark": 1_650_000_000_000_000,
        "known_position": [3, 5],
        "declarations_hash": "abc",
        "model_versions": "{}",
        "degraded": ["l2"],
        "timings_ms": "{}",
        "user_features": {"user_num_views_1h": 2.0, "user_ctr_1d": None},
        "user_sequences": {"user_last_clicks_30d": ["n1", "n2"]},
        "user_maps": {"user_events_by_type_1d": {"click": 2.0, "view": None}},
        "candidates": [
            {
                "impression_id": "r1:0",
                "note_id": "n1",
                "author_id": None,
                "sources": ["trending", "fresh"],
                "recall_score": 0.1,
                "l1_score": None,
                "final_score": 0.5,
                "position": 0,
                "shown": True,
                "slot": "exploration",
                "propensity": 0.125,
                "features": {"note_ctr_1d": None, "note_num_views_1h": 7.0},
                "predictions": {"click": 0.25},
                "sequences": {"note_top_readers_1d": ["u2"], "note_last_readers_1d": []},
                "maps": {"note_events_by_type_1d": {"like": 1.0}, "note_ms_by_reader_1d": {}},
            },
            {
                "impression_id": None,
                "note_id": "n2",
                "author_id": "a",
                "sources": ["fresh"],
                "recall_score": 0.05,
                "l1_score": 0.1,
                "final_score": None,
                "position": None,
                "shown": False,
                "slot": None,
                "propensity": None,
                "features": None,
                "predictions": {},
                "sequences": None,
                "maps": None,
            },
        ],
    }


@pytest.fixture
def lake(tmp_path):
    return Lake.open(Home(tmp_path))


def table(request_id="r1", **changes):
    return rows_to_table([row(request_id) | changes]).cast(CODED_SCHEMA)


def made(makers, pause=lambda: None):
    return pa.concat_tables([make() for make in makers])


def opened(lake, max_waiting=100, max_rows=50, max_age_s=60.0, make=made, **more):
    forward_log = ForwardLog(lake, max_waiting, max_rows, max_age_s, make, **more)
    forward_log.start()
    return forward_log


def offer(forward_log, numbers):
    for number in numbers:
        forward_log.offer(lambda n=number: table(f"r{n}"))


def test_a_table_of_an_older_version_gets_the_columns_that_it_lacks(lake):
    at = FORWARD_LOG_SCHEMA.get_field_index("candidates")
    newer = ("slot", "propensity", "sequences", "maps")
    fields = [field for field in FORWARD_LOG_SCHEMA.field(at).type.value_type if field.name not in newer]
    older = FORWARD_LOG_SCHEMA.set(at, pa.field("candidates", pa.list_(pa.struct(fields)), nullable=False))
    older = older.remove(older.get_field_index("user_maps"))
    lake.create(FORWARD_LOG, older)
    first, second = row("r1"), row("r2")
    del second["user_sequences"]["user_last_clicks_30d"]
    rows = rows_to_table([first]).to_pylist()
    lake.append(FORWARD_LOG, pa.Table.from_pylist(rows, schema=older))
    forward_log = opened(lake)
    assert forward_log.offer(lambda: rows_to_table([second]))
    forward_log.close()
    scanned = lake.scan(FORWARD_LOG).to_pylist(maps_as_pydicts="strict")
    stored = {item["request_id"]: item for item in scanned}
    old, new = (stored[name]["candidates"][0] for name in ("r1", "r2"))
    assert (old["slot"], old["final_score"], old["maps"], stored["r1"]["user_maps"]) == (None, 0.5, None, None)
    assert (new["slot"], new["propensity"]) == ("exploration", 0.125)
    assert (new["sequences"], new["maps"]) == (second["candidates"][0]["sequences"], second["candidates"][0]["maps"])
    assert stored["r2"]["user_maps"] == second["user_maps"]


def test_a_row_comes_back_from_the_lake_as_it_was(lake):
    forward_log = opened(lake)
    assert forward_log.offer(table)
    forward_log.close()
    stored = lake.scan(FORWARD_LOG)
    assert stored.schema.names == FORWARD_LOG_SCHEMA.names
    back = stored.to_pylist(maps_as_pydicts="strict")[0]
    assert back["candidates"] == row()["candidates"]
    assert back["user_features"] == row()["user_features"]
    assert back["user_sequences"] == row()["user_sequences"]
    assert back["user_maps"] == row()["user_maps"]
    assert back["known_position"] == [3, 5]
    assert back["request_ts"].timestamp() == pytest.approx(1_650_000_000.000001)
    assert (forward_log.num_written, forward_log.num_dropped, forward_log.num_waiting) == (1, 0, 0)


def test_its_files_are_written_cheaply_also_by_a_table_of_an_older_version(lake):
    lake.create(FORWARD_LOG, FORWARD_LOG_SCHEMA)
    for _ in range(2):
        opened(lake).close()
        metadata = lake.table(FORWARD_LOG).metadata
        assert metadata.properties["write.parquet.compression-level"] == "1"
    assert len(metadata.metadata_log) == 1  # the second start found them


def test_flush_writes_at_once_and_close_writes_the_rest(lake):
    forward_log = opened(lake)
    forward_log.offer(table)
    assert forward_log.flush()
    assert lake.scan(FORWARD_LOG).num_rows == 1
    forward_log.offer(lambda: table("r2"))
    assert lake.scan(FORWARD_LOG).num_rows == 1
    forward_log.close()
    assert sorted(lake.scan(FORWARD_LOG)["request_id"].to_pylist()) == ["r1", "r2"]


@pytest.mark.parametrize(("max_rows", "max_age_s"), [(2, 60.0), (50, 0.05)])
def test_rows_are_written_by_number_and_by_age_without_being_asked(lake, max_rows, max_age_s):
    forward_log = opened(lake, max_rows=max_rows, max_age_s=max_age_s)
    forward_log.offer(table)
    forward_log.offer(lambda: table("r2"))
    deadline = time.monotonic() + 10
    while forward_log.num_written < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert forward_log.num_written == 2
    forward_log.close()


def test_rows_are_made_while_nothing_is_under_way_but_wait_for_that_no_longer_than_said(lake, monkeypatch):
    monkeypatch.setattr("serving.forward_log._WAITS_FOR_REST_S", 60.0)
    is_resting, sizes, made_some = threading.Event(), [], threading.Event()

    def make(makers, pause):
        sizes.append(len(makers))
        made_some.set()
        return made(makers)

    forward_log = opened(lake, make=make, is_resting=is_resting.is_set)
    offer(forward_log, range(8))
    assert not made_some.wait(0.3)
    is_resting.set()
    assert made_some.wait(10)
    assert sizes == [8]
    is_resting.clear()
    made_some.clear()
    offer(forward_log, range(8, 24))  # as many as are made at once: the queue has an end
    assert made_some.wait(10)
    assert sum(sizes) == 24
    forward_log.offer(lambda: table("r24"))
    assert forward_log.flush(10)  # whoever asks for it does not wait for a rest
    made_some.clear()
    monkeypatch.setattr("serving.forward_log._WAITS_FOR_REST_S", 0.05)
    offer(forward_log, range(25, 33))
    assert made_some.wait(10)
    forward_log.close()
    assert sorted(lake.scan(FORWARD_LOG)["request_id"].to_pylist()) == sorted(f"r{n}" for n in range(33))


def test_a_request_that_comes_while_rows_are_made_is_waited_for(lake, monkeypatch):
    monkeypatch.setattr("serving.forward_log._WAITS_FOR_REST_S", 60.0)
    is_resting, is_making, ends = threading.Event(), threading.Event(), threading.Event()
    is_resting.set()

    def make(makers, pause):
        is_making.set()
        while is_resting.is_set():
            time.sleep(0.001)
        pause()
        ends.set()
        return made(makers)

    forward_log = opened(lake, make=make, is_resting=is_resting.is_set)
    offer(forward_log, range(8))
    assert is_making.wait(10)
    is_resting.clear()
    assert not ends.wait(0.3)
    is_resting.set()
    assert ends.wait(10)
    is_resting.clear()
    offer(forward_log, range(8, 12))
    forward_log.close()  # does not wait for a rest
    assert sorted(lake.scan(FORWARD_LOG)["request_id"].to_pylist()) == sorted(f"r{n}" for n in range(12))


def test_a_full_queue_drops_and_counts_and_never_blocks(lake, monkeypatch):
    stuck = threading.Event()
    real_write = Lake.write_files

    def slow_write(self, name, rows):
        stuck.wait(10)
        return real_write(self, name, rows)

    monkeypatch.setattr(Lake, "write_files", slow_write)
    forward_log = opened(lake, max_waiting=3, max_rows=1)
    started = time.monotonic()
    taken = [forward_log.offer(lambda n=n: table(f"r{n}")) for n in range(20)]
    assert time.monotonic() - started < 1
    assert taken.count(False) == forward_log.num_dropped >= 16  # 3 wait, at most 1 is with the writer
    stuck.set()
    forward_log.close()
    assert forward_log.num_written == taken.count(True) == lake.scan(FORWARD_LOG).num_rows


@pytest.mark.parametrize("step", ["write_files", "add_files"])
def test_a_write_that_fails_is_tried_again(step, lake, monkeypatch, caplog):
    real_step, failures = getattr(Lake, step), [OSError("no space left on device")]

    def failing_step(*arguments):
        if failures:
            raise failures.pop()
        return real_step(*arguments)

    monkeypatch.setattr(Lake, step, failing_step)
    monkeypatch.setattr("serving.forward_log.RETRY_S", 0.01)
    forward_log = opened(lake)
    forward_log.offer(table)
    assert forward_log.flush()
    assert lake.scan(FORWARD_LOG).num_rows == 1
    assert forward_log.num_failed_writes == 1
    assert "no space left on device" in caplog.text
    forward_log.close()


def test_a_row_that_does_not_fit_is_dropped_alone(lake, caplog):
    forward_log = opened(lake)
    forward_log.offer(lambda: table(request_ts="yesterday"))
    forward_log.offer(lambda: table("r2"))
    forward_log.close()
    assert lake.scan(FORWARD_LOG)["request_id"].to_pylist() == ["r2"]
    assert (forward_log.num_written, forward_log.num_dropped) == (1, 1)
    assert "does not fit the schema" in caplog.text


def test_a_process_writes_and_is_started_again_when_it_was_killed(lake, tmp_path):
    writer = LogWriter(Home(tmp_path), tmp_path / "turn.lock")
    forward_log = opened(lake, elsewhere=writer)
    assert writer.pid is None
    forward_log.offer(table)
    assert forward_log.flush()
    first = writer.pid
    assert os.getpriority(os.PRIO_PROCESS, first) > os.getpriority(os.PRIO_PROCESS, 0)
    os.kill(first, signal.SIGTERM)  # as a terminal or a supervisor sends it to all: not to this one, which ends with the server
    forward_log.offer(lambda: table("r2"))
    assert forward_log.flush()
    assert (writer.pid, forward_log.num_failed_writes) == (first, 0)
    os.kill(first, signal.SIGKILL)
    forward_log.offer(lambda: table("r3"))
    assert forward_log.flush()
    assert (writer.pid != first, forward_log.num_dropped) == (True, 0)
    second = writer.pid
    forward_log.offer(lambda: table("r4"))
    forward_log.close()
    writer.close()
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)
    stored = lake.scan(FORWARD_LOG)
    assert sorted(stored["request_id"].to_pylist()) == ["r1", "r2", "r3", "r4"]
    wanted = rows_to_table([row("r3")]).to_pylist()
    assert stored.filter(pc.field("request_id") == "r3").to_pylist() == wanted


def test_what_a_process_cannot_write_it_says(lake, tmp_path):
    opened(lake).close()
    writer = LogWriter(Home(tmp_path), tmp_path / "no such folder" / "turn.lock")
    with pytest.raises(OSError, match=r"FileNotFoundError: .*turn\.lock"):
        writer.write([table()], uuid.uuid4())
    writer.close()


def test_rows_that_were_sent_ahead_are_written_once_whatever_became_of_them(lake, tmp_path):
    opened(lake).close()
    writer, tables = LogWriter(Home(tmp_path), tmp_path / "turn.lock"), [table(f"r{number}") for number in range(5)]

    def in_lake() -> list[str]:
        return sorted(lake.scan(FORWARD_LOG)["request_id"].to_pylist())

    writer.send_ahead(tables[0])
    writer.write(tables[:2], uuid.uuid4())
    assert in_lake() == ["r0", "r1"]
    writer.send_ahead(tables[2])
    os.kill(writer.pid, signal.SIGKILL)
    batch = uuid.uuid4()
    with pytest.raises(OSError, match="has ended"):
        writer.write(tables[2:4], batch)
    writer.write(tables[2:4], batch)
    assert in_lake() == ["r0", "r1", "r2", "r3"]
    writer.send_ahead(tables[0])  # rows that no write will name
    writer.write(tables[4:], uuid.uuid4())
    assert in_lake() == ["r0", "r1", "r2", "r3", "r4"]
    writer.close()


def test_a_batch_that_was_written_before_its_writer_died_is_not_written_again(lake, tmp_path):
    opened(lake).close()
    first, second = uuid.uuid4(), uuid.uuid4()
    for batch, rows in ((first, table()), (second, table("r2")), (first, table())):
        write_once(lake, rows, batch)
    assert sorted(lake.scan(FORWARD_LOG)["request_id"].to_pylist()) == ["r1", "r2"]
    assert len(list((tmp_path / "lake").rglob("forward_log/data/**/*.parquet"))) == 2  # what is not added does not stay


def test_what_breaks_off_is_not_written(lake, tmp_path):
    opened(lake).close()
    part, numbers = table().to_batches()[0], [uuid.uuid4() for _ in range(9)]
    many = table().to_batches() * ENCODED_AT_ONCE  # are encoded as they come

    def sent(*said) -> bytes:
        stream = io.BytesIO()
        writer = pa.ipc.new_stream(stream, CODED_SCHEMA)  # not closed, as by a server that was killed
        for one in said:
            if isinstance(one, dict):
                writer.write_batch(part.slice(0, 0), custom_metadata=one)
            else:
                writer.write_batch(one)
        return stream.getvalue()

    def after(stream: bytes) -> tuple[list[bytes], int, int]:
        answers = list(written(io.BytesIO(stream), lake, tmp_path / "turn.lock"))
        files = list((tmp_path / "lake").rglob("forward_log/data/**/*.parquet"))
        return answers, lake.scan(FORWARD_LOG).num_rows, len(files)

    def write() -> dict[bytes, bytes]:
        return {b"write": numbers.pop().bytes}

    done, forget = b"written\n", {b"forget": b""}
    assert after(sent(part, write(), part, write())[:-1]) == ([done], 1, 1)
    assert after(sent(part, forget, part, write())) == ([done], 2, 2)
    assert after(sent(*many, part, forget, part, write())) == ([done], 3, 3)
    assert after(sent(*many, part, write())) == ([done], 4 + ENCODED_AT_ONCE, 4)
    for broken in (sent(part), sent(*many, part), sent(*many, part)[:-1], sent(), b""):
        assert after(broken) == ([], 4 + ENCODED_AT_ONCE, 4)
    rows = lake.scan(FORWARD_LOG).to_pylist()
    assert all(one == rows[0] for one in rows)
    assert rows[0] == rows_to_table([row()]).to_pylist()[0]


@pytest.mark.skipif(not can_return_from_idle(), reason="needs Linux and the right to raise a priority")
def test_rows_are_encoded_and_committed_in_time_that_nobody_wants(lake, tmp_path, monkeypatch):
    opened(lake).close()
    seen = {}

    def watched(name, real):
        def step(*given):
            until = time.monotonic() + 1.5
            while os.sched_getscheduler(0) != os.SCHED_IDLE and time.monotonic() < until:
                time.sleep(0.002)
            seen[name] = os.sched_getscheduler(0) == os.SCHED_IDLE
            return real(*given)

        return step

    for name in ("write", "close"):
        monkeypatch.setattr(FileWriter, name, watched(name, getattr(FileWriter, name)))
    monkeypatch.setattr("serving.log_writer.commit_once", watched("commit", commit_once))
    stream, part = io.BytesIO(), table().to_batches()[0]
    writer = pa.ipc.new_stream(stream, CODED_SCHEMA)
    writer.write_batch(part)
    writer.write_batch(part.slice(0, 0), custom_metadata={b"write": uuid.uuid4().bytes})
    assert list(written(io.BytesIO(stream.getvalue()), lake, tmp_path / "turn.lock")) == [b"written\n"]
    assert seen == {"write": True, "close": True, "commit": True}
    assert lake.scan(FORWARD_LOG).num_rows == 1


@pytest.mark.parametrize("step", ["write", "_finish"])
def test_what_fails_fails_its_batch_alone_and_leaves_no_file(step, lake, tmp_path, monkeypatch):
    opened(lake).close()
    parts, real_step = table().to_batches() * ENCODED_AT_ONCE, getattr(FileWriter, step)
    failures = [OSError("no space left on device")]

    def failing(self, *rows):
        if step == "write":
            real_step(self, *rows)
        if failures:
            raise failures.pop()
        if step != "write":
            real_step(self, *rows)

    monkeypatch.setattr(FileWriter, step, failing)
    stream, number = io.BytesIO(), uuid.uuid4()
    writer = pa.ipc.new_stream(stream, CODED_SCHEMA)
    for _ in range(2):  # the second time as it is sent again
        for part in parts * 2:
            writer.write_batch(part)
        writer.write_batch(parts[0].slice(0, 0), custom_metadata={b"write": number.bytes})
    answers = list(written(io.BytesIO(stream.getvalue()), lake, tmp_path / "turn.lock"))
    assert answers == [b"OSError: no space left on device\n", b"written\n"]
    assert lake.scan(FORWARD_LOG).num_rows == 2 * ENCODED_AT_ONCE
    (file,) = (tmp_path / "lake").rglob("forward_log/data/**/*.parquet")
    assert pq.ParquetFile(file).num_row_groups == 2


def test_generators_are_told_by_what_each_added():
    rng = np.random.default_rng(5)
    share_CG = rng.integers(0, 4, (400, 5)).astype(np.float32) / 3
    offsets, places = ordered_shares(share_CG)
    for candidate, share_G in enumerate(share_CG):
        order = np.argsort(-share_G, kind="stable")
        wanted = order[share_G[order] > 0]
        np.testing.assert_array_equal(places[offsets[candidate] : offsets[candidate + 1]], wanted)
    assert [len(part) for part in ordered_shares(np.zeros((2, 3), np.float32))] == [3, 0]


def test_requests_by_columns_are_the_requests_by_rows(server, readers):
    parts = []
    for user_id in (*readers[:2], "nobody-ever-met"):
        request_id = server.feed(user_id, limit=7)["requestId"]
        served = server.engine.recent.get(request_id)
        assert len(served.candidates) > 7
        assert len(served.logged) > 0
        for some in (served.logged, served.logged[::3]):
            kept = np.searchsorted(served.logged, some)
            part = dataclasses.replace(served, logged=some, logged_features=served.logged_features.take(kept))
            parts.append(part)
    head, scores_C = next(iter(parts[0].predictions.items()))
    some = {**parts[0].predictions, head: np.where(np.arange(len(scores_C)) == 0, np.nan, scores_C)}
    parts += [dataclasses.replace(parts[0], predictions=predictions) for predictions in ({}, some)]
    parts.append(
        dataclasses.replace(
            parts[1], page=[], logged_features=CandidateFeatures((), np.empty((0, 0))), logged=parts[1].logged[:0]
        )
    )
    parts.append(dataclasses.replace(parts[0], candidates=with_an_author_less(parts[0].candidates)))
    pauses = []
    by_columns = as_table(parts, lambda: pauses.append(len(pauses)))
    assert len(pauses) > 10  # the interpreter is not held for long
    by_columns.validate(full=True)
    assert by_columns.schema == CODED_SCHEMA
    assert by_columns.to_pylist() == rows_to_table([part.as_row() for part in parts]).to_pylist()
    for candidates in by_columns["candidates"].chunks:
        for name in ("note_id", "author_id"):  # a text that has two places is written out each time
            texts = candidates.values.field(name).dictionary
            assert len(texts.unique()) == len(texts)


def with_an_author_less(candidates):
    """The same where the first of them has no author."""
    row, catalogue = candidates.row_C[0], candidates.catalogue
    author_ids, author_row_N = list(catalogue.author_ids), catalogue.author_row_N.copy()
    author_ids[row], author_row_N[row] = None, -1
    assert catalogue.author_ids[row] is not None
    catalogue = dataclasses.replace(catalogue, author_ids=author_ids, author_row_N=author_row_N)
    return dataclasses.replace(candidates, catalogue=catalogue)
