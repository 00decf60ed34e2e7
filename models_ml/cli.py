"""`headrace train …`: from the training export to published models, a report and a table."""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from models_ml import configuration, tables, train
from models_ml.evaluation import NDCG_AT
from models_ml.examples import load
from models_ml.logged_rows import as_served
from models_ml.registry import Registry
from models_ml.trainer.ranks import Ranks, ranks_of_environment
from warehouse.errors import HeadraceError
from warehouse.home import Home
from warehouse.lake import Lake

ALIASES = {"retrieval": "two_tower"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="headrace train", description="Train, evaluate and publish the models.")
    choices = ("all", *train.MODELS, *ALIASES)
    parser.add_argument("model", choices=choices, help="which one; `all` ends with the floor's comparison")
    parser.add_argument("--config", type=Path, help="YAML with sections named after models, and `trainer`")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint instead of from the start")
    parser.add_argument("--logged", action="store_true", help="train on the values that were served (the forward log)")
    parser.add_argument("--no-promote", action="store_true", help="move `candidate` alone and leave `production` as it is")
    parser.add_argument("--seed", type=int, help="the same seed on the same export gives the same weights (default 0)")
    parser.add_argument("--epochs", type=int, help="passes over the data for the networks (default: each model's own)")
    parser.add_argument("--export", help="folder or URL of the training export (default: exports/ in the Headrace home)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of tables")
    return parser


def main(words: list[str]) -> int:
    """words: `train` and its arguments. 0 when the models are published."""
    arguments = _parser().parse_args(words[1:])
    if arguments.epochs is not None and arguments.epochs < 1:
        raise HeadraceError(f"--epochs must be at least 1, got {arguments.epochs}")
    names = train.MODELS if arguments.model == "all" else (ALIASES.get(arguments.model, arguments.model),)
    configs = configuration.read(arguments.config) if arguments.config else configuration.Configs()
    if arguments.epochs:
        configs = configs.with_epochs(arguments.epochs)
    with ranks_of_environment(configs.trainer.rank_timeout_s) as ranks:
        return _train(arguments, names, configs, ranks)


def main_of_rank(words: list[str]) -> int:
    """`python -m models_ml.train l2 --config FILE`, as `torchrun` starts it on every rank."""
    try:
        return main(["train", *words])
    except HeadraceError as error:
        print(f"rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        return 2


def _train(arguments: argparse.Namespace, names: tuple[str, ...], configs: configuration.Configs, ranks: Ranks) -> int:
    home = Home.from_env()
    console = Console(stderr=True, quiet=not ranks.is_first)
    started = time.monotonic()
    place = arguments.export
    examples = load(place, configs.trainer.cache_of(place)) if place else load(home.exports)
    if arguments.logged:
        examples = as_served(examples, Lake.open(home).scan("lake.forward_log"))
        for rows, side in ((examples.train_rows, "before"), (examples.test_rows, "from")):
            if len(rows) == 0:
                raise HeadraceError(
                    f"nothing was served {side} the test's start {examples.manifest['test_start']}; serve longer"
                )
    console.print(examples.protocol(), highlight=False)
    seed = configs.seed if arguments.seed is None else arguments.seed
    columns = TextColumn("{task.description:<13}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bars:
        tasks = {name: bars.add_task(name, total=None, start=False) for name in names}

        def progress(name: str, done: int, total: int) -> None:
            bars.start_task(tasks[name])
            bars.update(tasks[name], completed=done, total=total)
            if done == total and not console.is_terminal:  # a log file shows no bars until the end
                console.print(f"{name}: trained after {time.monotonic() - started:.0f} s", highlight=False)

        options = train.Options(
            ranks,
            home.training,
            arguments.resume,
            promote=not arguments.no_promote,
            say=lambda line: console.print(line, highlight=False),
        )
        report = train.train(examples, names, configs, seed, Registry(home.models), progress, options)
    if not ranks.is_first:
        return 0
    if arguments.json:
        json.dump(report, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        _print(Console(), report)
    console.print(
        f"{', '.join(names)} in {time.monotonic() - started:.0f} s; report: {home.models / train.REPORT}", soft_wrap=True
    )
    return 0


def _print(console: Console, report: dict[str, Any]) -> None:
    if report["ranking"]:
        table = Table(title="Ranking on the test days", box=SIMPLE_HEAD, pad_edge=False)
        for name in ("model", "head", "AUC", "95 %", "NCE", "log loss", f"nDCG@{NDCG_AT}", "ECE"):
            table.add_column(name, justify="left" if name in ("model", "head") else "right")
        for model in ("l2", "l1", "floor"):
            for head, values in report["ranking"].get(model, {}).items():
                interval = tables.half_width("auc", values)  # both ends are in the report
                others = (tables.number(values[name]) for name in ("nce", "log_loss", f"ndcg@{NDCG_AT}", "ece"))
                table.add_row(model, head, tables.number(values["auc"]), interval, *others)
        console.print(table)
    for head, values in report["l2_over_floor"].items():
        gain, low, high = (tables.number(values[name], "+.4f") for name in ("auc", "low", "high"))
        console.print(f"L2 over the floor, {head}: AUC {gain} ({low} to {high}, paired)")
    for model, heads in report["not_learned"].items():
        for head, counts in heads.items():
            console.print(
                f"{model}, {head}: not learned, the interval of its AUC reaches .5; "
                f"{counts['positives_train']:,} positive rows to learn from, {counts['positives_test']:,} to test on",
                soft_wrap=True,
            )
    if report["retrieval"]:
        console.print(tables.retrieval(report["retrieval"]))
    if report["index_recall"]:
        console.print(tables.index_recall(report["index_recall"]))
