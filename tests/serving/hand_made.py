"""A served world small enough to reason about: a simulated lake, models worked out by hand, a clock that a test moves, and a
real uvicorn server on a free port."""

import contextlib
import dataclasses
import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import uvicorn
from fastapi import FastAPI

from models_ml.examples import LABELS, load
from models_ml.registry import Registry
from models_ml.train import Configs, train
from models_ml.two_tower import TwoTowerConfig
from warehouse.datasets.base import Dataset
from warehouse.datasets.simulator import simulate
from warehouse.features.declarations import load_groups
from warehouse.features.render import block_sql, retracted_sql, retractions_sql, roll_up_sql, shadowed_sql, staging_sql
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import EVENTS, land_dataset
from warehouse.time_algebra import FIVE_MINUTES_US, closed_tick, newest_tick

START = datetime(2022, 4, 25, tzinfo=UTC)
NOT_YET = "not-yet-created"
MODELS = ("item_to_item", "two_tower", "l1", "l2")


def furnish(home: Home, num_users: int, num_notes: int, days: int, more: Sequence[str] = ()) -> Dataset:
    """A home that can serve: a simulated lake with one note of the future, its features built, models trained for one epoch on
    features drawn at random (they rank, and nothing more is asked of them here). more: names of further features."""
    dataset = simulate(7, num_users, num_notes, days, START)
    future = {"note_id": NOT_YET, "author_id": "a0", "topics": ["art"], "note_type": "NORMAL", "duration_ms": 9000}
    future["created_at"] = datetime(2030, 1, 1, tzinfo=UTC)
    notes = pa.concat_tables([dataset.notes, pa.Table.from_pylist([future], schema=dataset.notes.schema)])
    dataset = dataclasses.replace(dataset, notes=notes)
    lake = Lake.open(home)
    land_dataset(lake, dataset)
    build_features(lake)
    export(home, dataset, more=more)
    configs = Configs(two_tower=TwoTowerConfig(user_features=("user_*", "attributes"))).with_epochs(1)
    train(load(home.exports), MODELS, configs, 7, Registry(home.models), lambda name, done, total: None)
    return dataset


def build_features(lake: Lake) -> None:
    """What `dbt build` makes of the whole log, by the same macros: staging, blocks of three lengths, all replaced."""
    with lake.duckdb() as connection:
        landed = connection.execute("select max(epoch_us(landed_at)) from lake.events group by log_partition").fetchall()
        tick_us = closed_tick([last for (last,) in landed])
        assert tick_us is not None
        until_us = tick_us + FIVE_MINUTES_US

        def put(name: str, sql: str) -> None:
            query = f"select * from ({sql}) as built where known_at < make_timestamptz({until_us})"
            rows = connection.execute(query).to_arrow_table()
            is_empty = lake.create(name, rows.schema, {"known_at": "day"}).scan().count() == 0
            with lake.transaction(name) as transaction:
                transaction.append(rows) if is_empty else transaction.overwrite(rows)
                transaction.set_properties({"headrace.built_until": datetime.fromtimestamp(until_us / 1e6, UTC).isoformat()})
            lake.create_view(connection, name)

        put("staging.stg_engagements", staging_sql(EVENTS))
        put("staging.stg_shadowed_arrivals", shadowed_sql(EVENTS))
        put("staging.stg_retractions", retractions_sql(EVENTS))
        connection.execute(f"create view retracted as {retracted_sql('staging.stg_engagements', 'staging.stg_retractions')}")
        for name, group in load_groups().items():
            put(f"features.{name}", block_sql(group, "staging.stg_engagements", "retracted"))
            put(f"features.{name}_1h", roll_up_sql(group, f"features.{name}", 60))
            put(f"features.{name}_1d", roll_up_sql(group, f"features.{name}_1h", 1440))


def export(home: Home, dataset: Dataset, num_rows: int = 1500, more: Sequence[str] = ()) -> None:
    """A training export of the contract's shape: real impressions, features drawn at random, labels that follow one of them."""
    rng = np.random.default_rng(7)
    views = dataset.events.filter(pc.equal(dataset.events["event_type"], "view")).slice(0, num_rows).sort_by("event_ts")
    features = [*(name for group in load_groups().values() for name in group.feature_names), *more]
    columns = {name: views[name] for name in ("impression_id", "user_id", "note_id", "author_id", "surface")}
    columns |= {"request_ts": views["event_ts"], "feature_watermark": views["event_ts"]}
    columns |= {name: pa.array(rng.uniform(0, 1 if "ctr" in name or "rate" in name else 50, len(views))) for name in features}
    notes = dataset.notes["note_id"].to_pylist()
    columns["user_last_clicks_30d"] = pa.array([rng.choice(notes, 5).tolist() for _ in range(len(views))])
    columns |= {
        "note_duration_ms": pa.array(rng.uniform(1e3, 1e5, len(views))),
        "note_age_min": pa.array(rng.uniform(0, 1e4, len(views))),
    }
    columns |= {"note_type": pa.array(["NORMAL"] * len(views)), "note_topic": pa.array(["art"] * len(views))}
    chance = columns["note_ctr_7d"].to_numpy()
    columns |= {
        f"label_{label}": pa.array((rng.random(len(views)) < chance / (1 + place)).astype(np.int64))
        for place, label in enumerate(LABELS)
    }
    pq.write_table(pa.table(columns), home.exports / "examples.parquet")
    pq.write_table(dataset.notes.sort_by("note_id"), home.exports / "notes.parquet")
    pq.write_table(dataset.users.sort_by("user_id"), home.exports / "users.parquet")
    test_start = views["event_ts"][len(views) * 4 // 5].as_py().isoformat()
    manifest = {
        "dataset": dataset.name,
        "snapshots": {},
        "declarations_hash": "",
        "test_start": test_start,
        "num_rows": len(views),
    }
    (home.exports / "manifest.json").write_text(json.dumps(manifest))


@dataclass
class Server:
    """`get` and `post` speak HTTP to a server in this process."""

    base_url: str
    app: FastAPI
    client: httpx.Client

    @property
    def engine(self):
        return self.app.state.engine

    def get(self, path, **arguments):
        return self.client.get(path, **arguments)

    def post(self, path, body, **arguments):
        return self.client.post(path, json=body, **arguments)

    def feed(self, user_id, **more):
        answer = self.post("/v1/feed", {"userId": user_id, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def explain(self, request_id, note_id=None):
        answer = self.get(f"/v1/explain/{request_id}", params={} if note_id is None else {"noteId": note_id})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait_for_tick(self, timeout_s=20.0):
        """Until requests read the newest tick that the server's clock allows."""
        world, deadline = self.engine.world, time.monotonic() + timeout_s
        while world.view_of("nobody")[0].tick_us < newest_tick(world.clock.now_us()):
            assert time.monotonic() < deadline, "the tick does not move"
            time.sleep(0.01)


def free_port() -> int:
    """One that nobody has, and that the kernel gives to no outgoing connection: a server may take seconds to come for it."""
    while True:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", 20_000 + secrets.randbelow(12_000))) as probe:
            return probe.getsockname()[1]


@contextlib.contextmanager
def running(app: FastAPI, timeout_s: float = 120.0) -> Iterator[Server]:
    """The app behind uvicorn, once it has answered /livez; stopped, with everything flushed, at the end."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, name="uvicorn", daemon=True)
    thread.start()
    base_url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=base_url, timeout=30.0, trust_env=False) as client:
            deadline = time.monotonic() + timeout_s
            while not server.started:
                assert thread.is_alive(), "the server ended while it started"
                assert time.monotonic() < deadline, f"no server on {base_url} after {timeout_s} s"
                time.sleep(0.02)
            yield Server(base_url, app, client)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until_ready(server: Server, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while (answer := server.get("/readyz")).status_code != 200:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.05)
