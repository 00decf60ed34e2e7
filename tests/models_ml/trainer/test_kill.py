"""SIGKILL at any moment, also inside a checkpoint's write, and more ranks than before: no row is lost or taken twice.

Runs as many kills as `HEADRACE_KILLS` says (`make faults`), a few otherwise."""

import json
import os
import random
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from models_ml.trainer.checkpoints import Checkpoints
from models_ml.trainer.fit import Run, fit
from models_ml.trainer.ranks import ranks_of_environment
from models_ml.trainer.settings import Plan, TrainerSettings
from tests.forked import FORKS, import_ahead
from tests.models_ml.trainer import toy, victim
from warehouse.errors import HeadraceError

KILLS = int(os.environ.get("HEADRACE_KILLS", "3"))
MOST_POINTS = 95
"""A run that is never killed reaches about as many crash points."""
import_ahead("tests.models_ml.trainer.test_kill")
REPOSITORY = Path(__file__).resolve().parents[3]


def forked(target, *arguments, ranks: int = 1, is_group: bool = False) -> list[int]:
    """Exit statuses of `ranks` processes that run it together, as torchrun would start them; -9 where one was killed. They are
    forked from a process that has imported everything. is_group: a single one is a group of ranks too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        FORKS.Process(target=_as_rank, args=(rank, ranks, port, is_group or ranks > 1, target, arguments))
        for rank in range(ranks)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    return [child.exitcode for child in children]


def _as_rank(rank: int, size: int, port: int, is_group: bool, target, arguments) -> None:
    if is_group:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    target(*arguments)


def run_victim(folder: Path, at: int, rows_file: Path | None = None, stop_at: int = -1, ranks: int = 1) -> list[int]:
    folder.mkdir(exist_ok=True)
    return forked(victim.main, folder, at, None if rows_file is None else str(rows_file), stop_at, ranks=ranks)


def test_killed_at_random_moments_it_ends_with_the_same_bits_and_every_row_seen_once(tmp_path):
    assert run_victim(tmp_path / "whole", 0) == [0]
    whole = torch.load(tmp_path / "whole" / "final.pt", weights_only=True)
    rng, killed, number = random.Random(KILLS), 0, 0
    while killed < KILLS:
        folder = tmp_path / f"run{number}"
        number += 1
        while not (folder / "final.pt").exists():
            (status,) = run_victim(folder, rng.randrange(1, MOST_POINTS) if killed < KILLS else 0)
            assert status in (0, -9)
            killed += status == -9
        final = torch.load(folder / "final.pt", weights_only=True)
        assert final["seen_R"].tolist() == [victim.PLAN.epochs] * toy.NUM_ROWS
        assert all(torch.equal(final[name], tensor) for name, tensor in whole.items())


def test_from_one_rank_to_two_every_row_is_consumed_once(tmp_path):
    rows_file = tmp_path / "rows"
    assert run_victim(tmp_path, 0, rows_file, stop_at=11) == [3]
    store = Checkpoints(tmp_path / "run")
    progress, _ = store.newest(lambda line: None)
    store.close()
    assert progress.step == 12
    assert run_victim(tmp_path, 0, rows_file, ranks=2) == [0, 0]
    steps: dict[int, list[int]] = {}
    for path in tmp_path.glob("rows.*"):
        for line in path.read_text().splitlines():
            step, row_ids = json.loads(line)
            steps.setdefault(step, []).extend(row_ids)
    assert (tmp_path / "rows.1").exists()
    per_epoch = len(steps) // victim.PLAN.epochs
    for epoch in range(victim.PLAN.epochs):
        seen = Counter(row for step in range(epoch * per_epoch, (epoch + 1) * per_epoch) for row in steps[step])
        assert seen == Counter(range(toy.NUM_ROWS))


def without_chance(folder: Path) -> None:
    """Trains without dropout, so that ranks draw nothing of their own; warnings are errors here too."""
    warnings.simplefilter("error")
    objective, optimizer = toy.toy_and_optimizer()
    objective.network[1].p = 0.0
    with ranks_of_environment(60.0) as ranks:
        run = Run(TrainerSettings(accumulate=2), ranks)
        fit(objective, toy.source(), toy.collate, optimizer, Plan(1, 48, 0.01, warm_up=0.1), 0, run)
        torch.save(objective.network.state_dict(), folder / f"{ranks.size}.{ranks.rank}.pt")


def test_two_ranks_learn_what_one_learns(tmp_path):
    assert forked(without_chance, tmp_path) == [0]
    assert forked(without_chance, tmp_path, ranks=2) == [0, 0]
    alone, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("1.0.pt", "2.0.pt", "2.1.pt"))
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], tensor, atol=1e-5), name


def test_a_group_of_one_rank_learns_what_a_process_alone_does(tmp_path):
    (tmp_path / "alone").mkdir()
    (tmp_path / "group").mkdir()
    assert forked(without_chance, tmp_path / "alone") == [0]
    assert forked(without_chance, tmp_path / "group", is_group=True) == [0]
    alone, group = (torch.load(tmp_path / name / "1.0.pt", weights_only=True) for name in ("alone", "group"))
    assert all(torch.equal(group[name], tensor) for name, tensor in alone.items())


def hang(folder: Path) -> None:
    with ranks_of_environment(1.0) as ranks:
        ranks.tell([0.0], "step 1")
        if ranks.rank == 1:
            time.sleep(3)
        try:
            ranks.tell([0.0], "step 2")
        except HeadraceError as error:
            (folder / f"said.{ranks.rank}").write_text(str(error))


def test_a_rank_that_hangs_is_named(tmp_path):
    forked(hang, tmp_path, ranks=2)
    said = (tmp_path / "said.0").read_text()
    assert said.startswith("rank 0 waited 1 s for the others at step 2: ")
    assert "1" in said.partition("step 2: ")[2]


@pytest.mark.skipif(KILLS <= 3, reason="starting Python three times over is left to `make faults`")
def test_torchrun_starts_the_ranks(tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    words += ["-m", "tests.models_ml.trainer.victim", str(tmp_path), "0"]
    assert subprocess.run(words, cwd=REPOSITORY, env=variables, timeout=240, capture_output=True).returncode == 0
    assert torch.load(tmp_path / "final.pt", weights_only=True)["seen_R"].sum() > 0
