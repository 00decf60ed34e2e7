"""Request rows beside impression rows: bytes on disk, rows a second, and the loss, of the same training; and the loader beside
torchdata's StatefulDataLoader on the same files.

    python -m bench.training --requests 20000      about two minutes on two cores

Requests of 20 to 60 candidates are the simulator's (`bench/simulated_requests.py`). Both layouts hold the same values in the
same types and codec (Parquet, zstd); impression rows repeat the reader's features, attributes and history on each row, as a
flat table must whose readers are to need no join. In order of time the codec finds most of the repetition again; shuffled, as
rows must lie for a trainer that reads them one after the other, it does not, so both are shown. An L2 is trained on each, with
as many candidates in a step; then `Loader` and StatefulDataLoader (`pip install torchdata`) read and collate the same files.
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
import torch
from rich.console import Console
from rich.table import Table

from bench.simulated_requests import ATTRIBUTES, HEADS, NOTE_FEATURES, USER_FEATURES, impressions, requests, shape
from models_ml import l2, ranking_rows, request_rows
from models_ml.l2_network import L2Config, L2Network
from models_ml.request_rows import RequestRows
from models_ml.seeding import seeded
from models_ml.trainer.fit import Run, fit
from models_ml.trainer.loader import Loader
from models_ml.trainer.rows import Rows
from models_ml.trainer.settings import Plan
from warehouse.home import Home


def train(rows: RequestRows, batch_size: int, config: L2Config) -> dict[str, float]:
    """An L2 on the rows, one pass."""
    words = shape()
    facts = ranking_rows.Facts(rows, USER_FEATURES, NOTE_FEATURES, config.heads)
    with seeded(0):
        network = L2Network(config, words)
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
        self._source = source
        self._groups: dict[int, Rows] = {}
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
    config = L2Config(heads=HEADS)
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
