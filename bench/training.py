"""Request rows beside impression rows: bytes on disk, rows a second, and the loss, of the same training; and the loader beside
torchdata's StatefulDataLoader on the same files.

    python -m bench.training --requests 20000      about two minutes on two cores

Requests of 20 to 60 candidates are made with a fixed seed: readers with a taste, a history of up to 100 notes,
features like the demo's. Both layouts hold the same values in the same types and codec (Parquet, zstd);
impression rows repeat the reader's
features, attributes and history on each row, as a flat table must whose readers are to need no join. In order of time the codec
finds most of the repetition again, so the bytes of the same rows shuffled, as a flat table is often kept, are shown too. An
L2 is trained on each, with as many candidates in a step; then `Loader` and StatefulDataLoader (`pip install torchdata`)
read and collate the same files.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from models_ml import l2, ranking_rows, request_rows
from models_ml.l2 import L2Config
from models_ml.notes import NoteWords
from models_ml.request_rows import HISTORY, RequestRows
from models_ml.seeding import seeded
from models_ml.trainer.fit import Run, fit
from models_ml.trainer.loader import Loader
from models_ml.trainer.rows import Rows
from models_ml.trainer.settings import Plan
from warehouse.home import Home

NUM_NOTES, NUM_AUTHORS, NUM_TOPICS, NUM_USERS = 5000, 500, 20, 4000
USER_FEATURES = tuple(
    f"user_{what}_{window}" for what in ("num_views", "num_clicks", "num_likes") for window in ("1h", "1d", "7d")
)
NOTE_FEATURES = tuple(
    f"{entity}_{what}_{window}"
    for entity in ("note", "author", "user_author")
    for what in ("num_views", "num_clicks")
    for window in ("1h", "1d", "7d")
)
ATTRIBUTES = tuple(f"kind{number}=yes" for number in range(8))


def requests(num: int, seed: int = 0) -> pa.Table:
    """`num` requests as `request_rows.requests_of` gives them."""
    rng = np.random.default_rng(seed)
    topic_of = rng.integers(0, NUM_TOPICS, NUM_NOTES)
    quality = rng.normal(0, 0.8, NUM_NOTES)
    user = rng.integers(0, NUM_USERS, num)
    taste = rng.integers(0, NUM_TOPICS, NUM_USERS)
    counts = rng.integers(20, 61, num)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    note = (rng.zipf(1.3, offsets[-1]) - 1) % NUM_NOTES
    row = np.repeat(np.arange(num), counts)
    popularity = np.bincount(note, minlength=NUM_NOTES)

    def words(prefix: str, numbers: np.ndarray) -> pa.Array:
        return pa.array([f"{prefix}{number}" for number in range(int(numbers.max(initial=0)) + 1)]).take(pa.array(numbers))

    def nested(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)

    def history_notes(taste_of_row: np.ndarray, sizes: np.ndarray) -> pa.Array:
        chosen = rng.integers(0, NUM_NOTES, int(sizes.sum()))
        liked = np.repeat(taste_of_row, sizes)
        again = topic_of[chosen] != liked
        chosen[again] = rng.integers(0, NUM_NOTES, int(again.sum()))
        starts = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
        return pa.ListArray.from_arrays(starts, words("note_", chosen))

    columns: dict[str, pa.Array] = {
        "user_id": words("user_", user),
        "surface": words("tab_", rng.integers(0, 3, num)),
        "request_ts": pa.array(1_650_000_000_000_000 + np.arange(num) * 1_000_000, pa.timestamp("us", "UTC")),
        "user_attributes": pa.array([json.dumps({f"kind{number % 8}": "yes"}) for number in user.tolist()]),
        HISTORY: history_notes(taste[user], rng.integers(10, request_rows.HISTORY_PLACES + 1, num)),
    }
    for name in USER_FEATURES:
        columns[name] = pa.array(rng.poisson(20, num).astype(np.float64))
    columns["impression_id"] = nested(words("i", np.arange(offsets[-1])))
    columns["note_id"] = nested(words("note_", note))
    columns["author_id"] = nested(words("author_", note % NUM_AUTHORS))
    for name in NOTE_FEATURES:
        columns[name] = nested(pa.array(rng.poisson(1 + popularity[note] / 50).astype(np.float64)))
    logit = quality[note] + 1.5 * (topic_of[note] == taste[user[row]]) - 1.5
    for name, shift in (("click", 0.0), ("long_view", -0.5)):
        label = rng.random(len(note)) < 1 / (1 + np.exp(-logit - shift))
        columns[f"label_{name}"] = nested(pa.array(label.astype(np.int8)))
    return pa.table(columns)


def impressions(table: pa.Table) -> pa.Table:
    """One row for each candidate, everything of the request repeated on it; lists of one keep the columns' names and types."""
    offsets = request_rows.offsets_of(table)
    row = pa.array(np.repeat(np.arange(len(table)), np.diff(offsets)))
    one = pa.array(np.arange(offsets[-1] + 1), pa.int32())
    columns = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        is_candidate = pa.types.is_list(column.type) and name != HISTORY
        columns[name] = pa.ListArray.from_arrays(one, column.flatten()) if is_candidate else column.take(row)
    return pa.table(columns)


def shape() -> l2.Shape:
    """The vocabularies of `requests`."""
    numbers = np.arange(NUM_NOTES)
    words = NoteWords(
        [f"note_{number}" for number in numbers],
        [f"author_{number}" for number in range(NUM_AUTHORS)],
        [f"topic_{number}" for number in range(NUM_TOPICS)],
    )
    return l2.Shape(words, USER_FEATURES, NOTE_FEATURES, ("tab_0", "tab_1", "tab_2"), ATTRIBUTES)


def train(rows: RequestRows, batch_size: int, config: L2Config) -> dict[str, float]:
    """An L2 on the rows, one pass."""
    words = shape()
    facts = ranking_rows.Facts(rows, USER_FEATURES, NOTE_FEATURES, config.heads)
    with seeded(0):
        network = l2.L2Network(config, words)
        facts.fit(network.user_inputs, network.note_inputs)
        ranking_rows.set_bias(network.last_bias_KT, facts.base_rate_T)
    source = rows.encoded(l2.encoder_of(words, config))
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    started = time.perf_counter()
    plan = Plan(1, batch_size, config.learning_rate, config.warm_up)
    fitted = fit(l2.L2Objective(network), source, lambda part: l2.tensors_of(part, len(ATTRIBUTES)), optimizer, plan, 0, Run())
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "impressions_per_s": rows.num_candidates / seconds, "loss": fitted.loss}


def read(rows: RequestRows, batch_size: int, config: L2Config) -> dict[str, float]:
    """Seconds and rows a second of one epoch through `Loader`."""
    source = rows.encoded(l2.encoder_of(shape(), config))
    loader = Loader(source, 0, batch_size, lambda part: l2.tensors_of(part, len(ATTRIBUTES)))
    return _timed(rows.num_rows, lambda: sum(len(batch.rows) for batch in loader.iterate(0, 1)))


def read_stateful(rows: RequestRows, batch_size: int, config: L2Config) -> dict[str, float] | None:
    """The same files, encoding and batches through torchdata's StatefulDataLoader, with two worker processes. A map-style data
    set would read a row group again for each of its rows, so it keeps the groups it has decoded."""
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError:
        return None
    source = rows.encoded(l2.encoder_of(shape(), config))
    dataset = _Cached(source)
    loader = StatefulDataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=2, collate_fn=_collate)
    return _timed(rows.num_rows, lambda: sum(len(batch["user"]) for batch in loader))


class _Cached(torch.utils.data.Dataset):
    def __init__(self, source: Any):
        self._source, self._groups = source, {}
        self._ends = np.cumsum(source.group_sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, place: int) -> Any:
        group = int(np.searchsorted(self._ends, place, side="right"))
        if group not in self._groups:
            self._groups[group] = self._source.read(group)
        first = int(self._ends[group - 1]) if group else 0
        return self._groups[group].take(np.array([place - first]))


def _collate(parts: list) -> dict[str, torch.Tensor]:
    return l2.tensors_of(Rows.concat(parts), len(ATTRIBUTES))


def _timed(num_rows: int, work: Callable[[], int]) -> dict[str, float]:
    started = time.perf_counter()
    seen = work()
    seconds = time.perf_counter() - started
    if seen != num_rows:
        raise RuntimeError(f"read {seen} of {num_rows} rows")
    return {"seconds": seconds, "rows_per_s": num_rows / seconds}


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description="Request rows beside impression rows.")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(words)
    folder = Home.from_env().tmp / "bench_training"
    config = L2Config()
    table = requests(given.requests)
    layouts = {"request rows": table, "impression rows": impressions(table)}
    mean = len(layouts["impression rows"]) / len(table)
    found: dict[str, Any] = {"requests": len(table), "impressions": len(layouts["impression rows"])}
    try:
        for name, layout in layouts.items():
            path = folder / name.replace(" ", "_")
            request_rows.write(layout, path, {})
            size = sum(file.stat().st_size for file in path.glob("*.parquet"))
            batch_size = 64 if name == "request rows" else math.ceil(64 * mean)
            rows = RequestRows(path)
            found[name] = {"bytes": size, **train(rows, batch_size, config)}
            if name == "request rows":
                found["loader"] = read(rows, batch_size, config)
                found["StatefulDataLoader"] = read_stateful(rows, batch_size, config)
            else:
                shuffled = layout.take(np.random.default_rng(0).permutation(len(layout)))
                request_rows.write(shuffled, folder / "shuffled", {})
                found["shuffled_bytes"] = sum(file.stat().st_size for file in (folder / "shuffled").glob("*.parquet"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if given.json:
        json.dump(found, sys.stdout, indent=1)
        return 0
    _print(found)
    return 0


def _print(found: dict[str, Any]) -> None:
    ours, theirs = found["request rows"], found["impression rows"]
    shown = Table(title=f"{found['requests']:,} requests, {found['impressions']:,} impressions, one pass of L2")
    for column in ("", "bytes", "impressions/s", "loss"):
        shown.add_column(column, justify="left" if not column else "right")
    for name in ("request rows", "impression rows"):
        one = found[name]
        shown.add_row(name, f"{one['bytes']:,}", f"{one['impressions_per_s']:,.0f}", f"{one['loss']:.4f}")
    shown.add_row("the same, shuffled", f"{found['shuffled_bytes']:,}", "", "")
    faster, smaller = ours["impressions_per_s"] / theirs["impressions_per_s"], theirs["bytes"] / ours["bytes"]
    shown.add_row(
        "ratio",
        f"{smaller:.1f} x fewer ({found['shuffled_bytes'] / ours['bytes']:.1f} x)",
        f"{faster:.1f} x",
        f"{ours['loss'] - theirs['loss']:+.4f}",
    )
    console = Console()
    console.print(shown)
    peer = found["StatefulDataLoader"]
    beside = "not installed: pip install torchdata" if peer is None else f"{peer['rows_per_s']:,.0f} rows/s"
    console.print(f"reading alone: Loader {found['loader']['rows_per_s']:,.0f} rows/s, StatefulDataLoader {beside}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
