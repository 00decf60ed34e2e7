"""A trainer to kill: `python -m tests.models_ml.trainer.victim FOLDER AT [ROWS.ndjson]`. It dies of SIGKILL at its AT-th crash
point (0: never): each step, each file of a checkpoint half written and written, before and after each rename. At the end it
writes its weights and what they have seen to FOLDER/final.pt. Under torchrun it trains on every rank; ROWS gets a line with the
step and the rows of each step and rank; with `stop_at` it gets SIGTERM at that step."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo  # the first optimiser step imports it: once, before there are forks

from models_ml.trainer import checkpoints
from models_ml.trainer.fit import Run, Stopped, fit
from models_ml.trainer.ranks import ranks_of_environment
from models_ml.trainer.settings import Plan, TrainerSettings
from tests.faults.crash_points import CrashPoints
from tests.models_ml.trainer import toy

PLAN = Plan(epochs=2, batch_size=48, learning_rate=0.01, warm_up=0.1)
SETTINGS = TrainerSettings(checkpoint_every=3, accumulate=2, rank_timeout_s=60)


def install(points: CrashPoints) -> None:
    write, rename = checkpoints.write_durably, os.rename

    def half_then_whole(path: Path, content: bytes) -> None:
        write(path, content[: len(content) // 2])
        points.reach()
        write(path, content)
        points.reach()

    def watched(old, new) -> None:
        points.reach()
        rename(old, new)
        points.reach()

    checkpoints.write_durably = half_then_whole
    checkpoints.os = type("os", (), {**vars(os), "rename": staticmethod(watched)})


def main(folder: Path, at: int, rows_file: str | None, stop_at: int = -1) -> None:
    points = CrashPoints(at)
    install(points)
    objective, optimizer = toy.toy_and_optimizer()

    with ranks_of_environment(SETTINGS.rank_timeout_s) as ranks:

        def watch(step: int, row_ids) -> None:
            if rows_file:
                with open(f"{rows_file}.{ranks.rank}", "a") as lines:
                    lines.write(json.dumps([step, row_ids.tolist()]) + "\n")
            points.reach()
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        run = replace(Run(SETTINGS, ranks, folder / "run", resume=True), watch=watch)
        try:
            fit(objective, toy.source(), toy.collate, optimizer, PLAN, 0, run)
        except Stopped:
            sys.exit(3)
        if ranks.is_first:
            torch.save(objective.state_dict(), folder / "final.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
