"""The trainer on a GPU: rows a second and MFU of L2 and the two-tower, beside the eager loop that one writes first.

    python -m bench.training_on_a_gpu [--compiled] [--json FILE]      under a minute on one GPU, two with --compiled

The eager loop: fp32, plain PyTorch in place of kernels, batches shuffled out of rows in memory and collated when it is their
turn, the loss (of the last batch) read at each step. The trainer: batches made ahead and pinned, losses read late, fused
losses, in fp32 and bf16. MFU is three times the operations of a forward pass, at the rows a second seen, over the peak of a
bf16 product measured in the same run: also for fp32, so that rows compare. All data is made with a fixed seed; `--device cpu`
tries it where there is no GPU.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.training import ATTRIBUTES, HEADS, NOTE_FEATURES, USER_FEATURES, requests, shape
from models_ml import l2, ranking_rows, two_tower
from models_ml.l2_network import L2Config, L2Network
from models_ml.notes import NoteWords
from models_ml.request_rows import RequestTable
from models_ml.seeding import seeded
from models_ml.tower_inputs import NoteContent, ReaderInputs
from models_ml.trainer.fit import Run, fit
from models_ml.trainer.ranks import Ranks
from models_ml.trainer.rows import ArraySource, Rows, Source
from models_ml.trainer.settings import Plan, TrainerSettings
from models_ml.trainer.speed import Speed
from models_ml.two_tower import TwoTowerConfig

WARM = 16
"""Steps before the clock starts."""


@dataclass(frozen=True)
class Work:
    """What is trained: objective() is a new one each time, from the same weights."""

    name: str
    objective: Callable[[], nn.Module]
    source: Source
    collate: Callable[[Rows], Mapping[str, Tensor]]
    plan: Plan


def ranking(name: str, config: L2Config, made: pa.Table, epochs: int) -> Work:
    """L2 on requests of 20 to 60 candidates."""
    table = RequestTable(made, name)
    facts = ranking_rows.Facts(table, USER_FEATURES, NOTE_FEATURES, config.heads)

    def objective() -> nn.Module:
        with seeded(0):
            network = L2Network(config, shape())
            facts.fit(network.user_inputs, network.note_inputs)
            ranking_rows.set_bias(network.last_bias_KT, facts.base_rate_T)
        return l2.L2Objective(network)

    source = table.encoded(l2.encoder_of(shape(), config))
    whole = Rows.concat([source.read(group) for group in range(len(source.group_sizes))])
    plan = Plan(epochs, config.batch_size, config.learning_rate)
    return Work(name, objective, ArraySource(whole, name, 1024), lambda rows: l2.tensors_of(rows, len(ATTRIBUTES)), plan)


def retrieval(config: TwoTowerConfig, num_notes: int, num_pairs: int) -> Work:
    """A two-tower on pairs of a history and the note that came next."""
    rng = np.random.default_rng(0)
    target = 1 + (rng.zipf(1.2, num_pairs) - 1) % num_notes
    history = rng.integers(0, num_notes + 1, (num_pairs, config.history_length), dtype=np.int32)
    words = NoteWords(
        [f"note_{number}" for number in range(num_notes)], [f"author_{number}" for number in range(1000)], ["topic"]
    )
    counts_N = torch.bincount(torch.from_numpy(target), minlength=num_notes + 1)
    log_q_N = (counts_N.clamp(min=1) / num_pairs).log()

    def objective() -> nn.Module:
        with seeded(0):
            network = two_tower.TwoTowerNetwork(config, words, ReaderInputs(), NoteContent())
            network.notes.author_of_note[1:] = 1 + torch.arange(num_notes) % 1000
            return two_tower.TwoTowerObjective(network, log_q_N, config.temperature)

    pairs = two_tower.Pairs(history, target, np.zeros((num_pairs, 0), np.float32), np.zeros(num_pairs, bool))
    plan = Plan(config.epochs, config.batch_size, config.learning_rate)
    return Work("two_tower", objective, ArraySource(two_tower.rows_of(pairs), "pairs"), two_tower.tensors_of, plan)


def eager_loop(work: Work, device: torch.device) -> dict[str, float | None]:
    """The loop that one writes first."""
    os.environ["HEADRACE_KERNELS"] = "torch"
    try:
        objective = work.objective().to(device).train()
        optimizer = torch.optim.AdamW(objective.parameters(), lr=work.plan.learning_rate)
        whole = Rows.concat([work.source.read(group) for group in range(len(work.source.group_sizes))])
        rng, speed, loss, step = np.random.default_rng(0), Speed(device), float("nan"), 0
        for _ in range(work.plan.epochs):
            order = rng.permutation(len(whole))
            for start in range(0, len(whole), work.plan.batch_size):
                rows = whole.take(order[start : start + work.plan.batch_size])
                batch = {name: tensor.to(device) for name, tensor in work.collate(rows).items()}
                total = objective(batch) / rows.num_candidates
                optimizer.zero_grad()
                total.backward()
                nn.utils.clip_grad_norm_(objective.parameters(), 5.0)
                optimizer.step()
                loss, step = total.item(), step + 1
                if step >= WARM:
                    speed.count(len(rows))
        some = whole.take(np.arange(min(work.plan.batch_size, len(whole))))
        moved = {name: tensor.to(device) for name, tensor in work.collate(some).items()}
        return {"rows_per_s": speed.rows_per_s, "mfu": speed.mfu(lambda: objective(moved), len(some)), "loss": loss}
    finally:
        del os.environ["HEADRACE_KERNELS"]


def trainer(work: Work, device: torch.device, settings: TrainerSettings) -> dict[str, float | None]:
    objective = work.objective()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=work.plan.learning_rate)
    run = Run(settings, Ranks(0, 1, device, 60.0), measure=True)
    fitted = fit(objective, work.source, work.collate, optimizer, work.plan, 0, run)
    return {"rows_per_s": fitted.rows_per_s, "mfu": fitted.mfu, "loss": fitted.loss}


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training_on_a_gpu", description="The trainer on a GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=400_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="through torch.compile too")
    parser.add_argument("--json", type=Path, help="a file that the figures are written to, after each of them")
    given = parser.parse_args(words)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    device = torch.device(given.device, 0) if given.device == "cuda" else torch.device(given.device)
    wide = L2Config(heads=HEADS, history_length=100, width=128, layers=4, attention_heads=4, hidden=512, members=8)
    made = requests(given.requests)
    works = [
        ranking("l2", L2Config(heads=HEADS), made, given.epochs),
        ranking("l2, wide", replace(wide, batch_size=512), made, given.epochs),
        retrieval(TwoTowerConfig(epochs=given.epochs, batch_size=8192), 50_000, given.pairs),
    ]
    ways: dict[str, Callable[[Work], dict[str, float | None]]] = {
        "eager loop": lambda work: eager_loop(work, device),
        "trainer, fp32": lambda work: trainer(work, device, TrainerSettings()),
        "trainer, bf16": lambda work: trainer(work, device, TrainerSettings(precision="bf16")),
    }
    if given.compiled:
        ways["trainer, bf16, compiled"] = lambda work: trainer(work, device, TrainerSettings(precision="bf16", compiled=True))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__}
    for way, measured in ways.items():
        for work in works:
            started = time.perf_counter()
            figures = measured(work)
            found.setdefault(work.name, {})[way] = figures
            took = time.perf_counter() - started
            print(f"{work.name}, {way}: {figures['rows_per_s']:,.0f} rows/s, {took:.0f} s", file=sys.stderr, flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps(found, indent=1) + "\n")
    _print(found, [work.name for work in works])
    return 0


def _print(found: dict[str, Any], names: list[str]) -> None:
    shown = Table(title=f"{found['device']}, torch {found['torch']}", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "", "rows/s", "x eager", "MFU", "loss"):
        shown.add_column(column, justify="right" if column else "left")
    for name in names:
        base = found[name]["eager loop"]["rows_per_s"]
        for way, one in found[name].items():
            mfu = "" if one["mfu"] is None else f"{one['mfu']:.2%}"
            faster = f"{one['rows_per_s'] / base:.1f}" if base else ""
            shown.add_row(name, way, f"{one['rows_per_s']:,.0f}", faster, mfu, f"{one['loss']:.4f}")
    Console().print(shown)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
