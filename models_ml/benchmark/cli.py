"""`headrace benchmark SET`: the published protocol on one set, ours beside the literature's figures and the floor."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from models_ml.benchmark import run, sequences
from models_ml.benchmark.published import SETS, PublishedSet
from warehouse.durable import write_out
from warehouse.errors import HeadraceError
from warehouse.home import Home


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="headrace benchmark", description="Next-item prediction under a published protocol.")
    parser.add_argument("set", help=f"one of {', '.join(SETS)}, or the path of a sequence file or of a folder that holds one")
    parser.add_argument("--model", choices=run.MODELS, default="blend", help="blend (the default) runs all the others too")
    parser.add_argument("--seeds", type=int, default=1, help="transformers to train, from seed 0 on (default 1)")
    parser.add_argument("--epochs", type=int, help="most passes over the data (default: from the set's statistics)")
    parser.add_argument("--seconds", type=float, help="most that one transformer may train; its rate falls with the time too")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where transformers train (default: a GPU if there is one)")
    parser.add_argument("--large", action=argparse.BooleanOptionalAction, help="a deeper network (default: on a GPU)")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="of the transformer: layers=2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for arithmetic (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    parser.add_argument("--out", type=Path, help="a file that the report is written to as JSON")
    return parser


def main(words: list[str]) -> int:
    """words: `benchmark` and its arguments. 0 when the report is printed."""
    arguments = _parser().parse_args(words[1:])
    for name in ("seeds", "epochs", "seconds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise HeadraceError(f"--{name} must be at least 1, got {value:g}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise HeadraceError("--device cuda: torch sees no GPU here; leave it out to train on the CPU")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    large = device == "cuda" if arguments.large is None else arguments.large
    changes = [*arguments.setting, *([f"seconds={arguments.seconds}"] if arguments.seconds else [])]
    known = SETS.get(arguments.set)
    if known is not None and not known.file().exists():
        raise HeadraceError(
            f"{arguments.set} is not at {known.file()}; point HEADRACE_DATA at the folder that holds {known.path}"
        )
    if known is None and not Path(arguments.set).exists():
        raise HeadraceError(f"{arguments.set!r} is neither a set ({', '.join(SETS)}) nor a file or folder")
    torch.set_num_threads(arguments.threads)
    console = Console(stderr=True)
    started = time.monotonic()
    loaded = sequences.read(known.file() if known else Path(arguments.set), arguments.set if known else None)
    console.print(
        f"{loaded.name}: {loaded.num_users:,} users, {loaded.num_items:,} items, {len(loaded.items_P):,} interactions",
        highlight=False,
    )

    def progress(line: str) -> None:
        console.print(f"{time.monotonic() - started:5.0f} s  {line}", highlight=False)

    checkpoints = Home.from_env().path / "benchmark"
    report = run.run(
        loaded, (arguments.model,), arguments.seeds, arguments.epochs, progress, checkpoints, device, large, changes
    )
    report["seconds"] = round(time.monotonic() - started, 1)
    report["published"] = [vars(figure) for figure in known.figures] if known else []
    if arguments.out is not None:
        write_out(arguments.out, json.dumps(report, indent=1).encode() + b"\n")
    if arguments.json:
        json.dump(report, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        _print(Console(), report, known)
    return 0


def _print(console: Console, report: dict[str, Any], known: PublishedSet | None) -> None:
    table = Table(title=f"{report['set']}: the next item of {report['num_asked']:,} users", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("model", "HR@10", "NDCG@10", "runs"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for figure in known.figures if known else ():
        table.add_row(f"{figure.model} (published)", f"{figure.hr:.4f}", f"{figure.ndcg:.4f}", "")
    for name, values in report["models"].items():
        label = f"{name} (the floor)" if name == run.FLOOR else name
        table.add_row(label, *(_with_spread(values, metric) for metric in ("hr@10", "ndcg@10")), str(len(values["runs"])))
    console.print(table)
    if known:
        console.print(f"{report['set']}: {known.note}", soft_wrap=True)
    console.print(f"protocol: {report['protocol']}", soft_wrap=True)


def _with_spread(values: dict[str, Any], metric: str) -> str:
    spread = values.get(f"{metric}_sd")
    return f"{values[metric]:.4f}" + (f" ±{spread:.4f}" if spread is not None else "")
