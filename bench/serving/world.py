"""A seeded synthetic world to serve: a simulated lake and models of the right shapes, which rank but have learned nothing.

Features of the training rows are drawn at random, so read no quality from it: only sizes and times.
"""

import dataclasses
import json
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from models_ml.examples import LABELS, load
from models_ml.registry import Registry
from models_ml.train import MODELS, Configs, train
from warehouse.datasets.base import Dataset
from warehouse.datasets.simulator import DEFAULT_START, simulate
from warehouse.features.declarations import load_groups
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import land_dataset
from warehouse.time_algebra import DAY_US, HOUR_US

SEED = 7
DAYS = 2
SETTINGS_FILE = "bench-serving.yml"
_DONE = "bench-serving.json"
_TRAINING_ROWS = 3_000


@dataclass(frozen=True)
class Size:
    """One world. candidates: about how many a request finds; L1 hands l1_top_k of them on."""

    notes: int
    readers: int
    candidates: int
    l1_top_k: int
    history: int
    width: int

    @property
    def limits(self) -> dict[str, int]:
        """Of each generator: they overlap, so that their sum is more than the candidates wanted."""
        shares = {"trending": 0.38, "fresh": 0.32, "item_to_item": 0.2, "two_tower": 0.35, "followed_authors": 0.05}
        return {name: round(share * self.candidates) for name, share in shares.items()}


FULL = Size(notes=100_000, readers=40_000, candidates=2_000, l1_top_k=500, history=100, width=64)
QUICK = Size(notes=3_000, readers=3_000, candidates=400, l1_top_k=100, history=50, width=24)


def furnish(home: Home, size: Size) -> None:
    """Makes the world in this home unless it is there. Raises ValueError if the home holds a world of another size."""
    # nothing is kept of a reader: the faster a server the sooner readers come again
    settings = {"generators": size.limits, "l1_top_k": size.l1_top_k, "deadline_ms": 10_000.0, "cached_readers": 0}
    home.path.mkdir(parents=True, exist_ok=True)
    (home.path / SETTINGS_FILE).write_text(yaml.safe_dump(settings))
    done = home.path / _DONE
    if done.exists():
        if json.loads(done.read_text()) != dataclasses.asdict(size):
            raise ValueError(f"{home.path} holds a world of another size; name an empty folder with --world")
        return
    dataset = _simulated(size)
    land_dataset(Lake.open(home), dataset)
    _export(home, dataset)
    configs = Configs().with_epochs(1)
    configs = dataclasses.replace(
        configs,
        two_tower=dataclasses.replace(configs.two_tower, width=size.width, pairs_per_reader=2),
        l2=dataclasses.replace(configs.l2, history_length=size.history, width=size.width),
    )
    names = [name for name in MODELS if name != "floor"]
    train(load(home.exports), names, configs, SEED, Registry(home.models), lambda name, done, total: None)
    done.write_text(json.dumps(dataclasses.asdict(size)))


def clock_setting(home: Home) -> str:
    """HEADRACE_CLOCK of a server that starts on this world now: an hour after its history ends, and later by as much as the
    world is old, so that a second server does not start before the events that the first one logged."""
    start_us = round(DEFAULT_START.timestamp() * 1_000_000)
    age_us = round((time.time() - (home.path / _DONE).stat().st_mtime) * 1_000_000)
    return f"{np.datetime64(start_us + DAYS * DAY_US + HOUR_US + age_us, 'us')}Z"


def readers_of(size: Size) -> list[str]:
    """All readers, in a seeded order: each is asked for once before any is asked for again."""
    return [f"u{reader}" for reader in np.random.default_rng(SEED).permutation(size.readers)]


def _simulated(size: Size) -> Dataset:
    """Every reader has watched `history` notes before the log begins."""
    dataset = simulate(SEED, size.readers, size.notes, DAYS, DEFAULT_START, requests_per_user_day=0.3)
    rng = np.random.default_rng(SEED)
    popular = rng.zipf(1.3, (size.readers, size.history)) % size.notes
    histories = [[f"n{note}" for note in watched] for watched in popular]
    users = dataset.users
    place = users.schema.get_field_index("history_note_ids")
    users = users.set_column(place, users.schema.field(place), pa.array(histories, users.schema.field(place).type))
    return dataclasses.replace(dataset, users=users)


def _export(home: Home, dataset: Dataset) -> None:
    """A training export of the contract's shape: real impressions, features drawn at random, labels that follow one of them."""
    rng = np.random.default_rng(SEED)
    views = dataset.events.filter(pc.equal(dataset.events["event_type"], "view"))
    views = views.take(np.sort(rng.choice(len(views), min(_TRAINING_ROWS, len(views)), replace=False))).sort_by("event_ts")
    rows = len(views)
    columns = {name: views[name] for name in ("impression_id", "user_id", "note_id", "author_id", "surface")}
    columns |= {"request_ts": views["event_ts"], "feature_watermark": views["event_ts"]}
    for name in (name for group in load_groups().values() for name in group.feature_names):
        columns[name] = pa.array(rng.uniform(0, 1 if "ctr" in name or "rate" in name else 50, rows))
    notes = dataset.notes["note_id"].to_pylist()
    columns["user_last_clicks_30d"] = pa.array([[notes[row] for row in rng.integers(0, len(notes), 5)] for _ in range(rows)])
    columns["note_duration_ms"] = pa.array(rng.uniform(1e3, 1e5, rows))
    columns["note_age_min"] = pa.array(rng.uniform(0, 1e4, rows))
    columns |= {"note_type": pa.array(["NORMAL"] * rows), "note_topic": pa.array(["art"] * rows)}
    chance = columns["note_ctr_7d"].to_numpy()
    for place, label in enumerate(LABELS):
        columns[f"label_{label}"] = pa.array((rng.random(rows) < chance / (1 + place)).astype(np.int64))
    pq.write_table(pa.table(columns), home.exports / "examples.parquet")
    pq.write_table(dataset.notes.sort_by("note_id"), home.exports / "notes.parquet")
    pq.write_table(dataset.users.sort_by("user_id"), home.exports / "users.parquet")
    manifest = {
        "dataset": dataset.name,
        "snapshots": {},
        "declarations_hash": "",
        "test_start": views["event_ts"][rows * 4 // 5].as_py().isoformat(),
        "num_rows": rows,
    }
    (home.exports / "manifest.json").write_text(json.dumps(manifest))
