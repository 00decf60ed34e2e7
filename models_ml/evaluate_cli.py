"""`headrace evaluate --model NAME@VERSION`: a published model on the test days, or what was predicted of served rows."""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from models_ml import bootstrap, evaluation, examples, item_to_item, l1, l2, metrics, plots, tables, two_tower
from models_ml.evaluation import NDCG_AT
from models_ml.examples import Examples
from models_ml.metrics_sql import METRICS, SERVED_ROWS
from models_ml.registry import Registry
from warehouse.durable import write_out
from warehouse.errors import HeadraceError
from warehouse.home import Home
from warehouse.lake import Lake

RANKERS = {"l1": l1.load, "l2": l2.load}
GENERATORS = {"item_to_item": item_to_item.load, "two_tower": two_tower.load}
COLUMNS = (
    "auc", "grouped_auc", "pr_auc", "nce", "log_loss", f"ndcg@{NDCG_AT}", "mrr", f"map@{NDCG_AT}", f"recall@{NDCG_AT}",
    f"coverage@{NDCG_AT}", "ece", "relative_calibration",
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="headrace evaluate", description="Metrics of a published model.")
    which = parser.add_mutually_exclusive_group(required=True)
    names = ", ".join(RANKERS | GENERATORS)
    which.add_argument("--model", help=f"NAME or NAME@VERSION or NAME@ALIAS, of {names}; without @: production")
    which.add_argument(
        "--served", metavar="HEAD", help="instead, what the forward log predicted for HEAD, in SQL over the lake"
    )
    parser.add_argument("--slice", default="", help="comma-separated: new_user, surface, note_type, note_topic, attribute keys")
    parser.add_argument("--export", help="folder or URL of the training export (default: exports/ in the Headrace home)")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write reliability and slice diagrams there, as SVG")
    parser.add_argument("--wait-min", type=int, default=30, help="--served: minutes after a request in which an action counts")
    parser.add_argument(
        "--bootstrap", type=int, default=bootstrap.SAMPLES, metavar="N",
        help=f"draws of readers for the intervals of the metrics (default {bootstrap.SAMPLES}); 0 leaves them out",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of tables")
    return parser


def main(words: list[str]) -> int:
    """words: `evaluate` and its arguments. 0 when the report is printed."""
    arguments = _parser().parse_args(words[1:])
    if arguments.bootstrap < 0:
        raise HeadraceError(f"--bootstrap must be at least 0, got {arguments.bootstrap}")
    home = Home.from_env()
    if arguments.served:
        if arguments.slice or arguments.plots or arguments.export:
            raise HeadraceError("--served asks the forward log; --slice, --plots and --export go with --model")
        report = served(Lake.open(home), arguments.served, arguments.wait_min, arguments.bootstrap)
    else:
        registry, export = Registry(home.models), arguments.export or home.exports
        report = of_model(registry, arguments.model, export, _names(arguments.slice), arguments.plots, arguments.bootstrap)
    if arguments.json:
        json.dump(evaluation.nullable(report), sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        _print(Console(), report)
    return 0


def of_model(
    registry: Registry,
    given: str,
    export: Path | str,
    slice_names: list[str],
    folder: Path | None,
    num_samples: int = bootstrap.SAMPLES,
) -> dict[str, Any]:
    """The report of NAME[@VERSION]: protocol, rules, metrics by head, and by slice; plots into `folder`. Of a generator: its
    recall beside popularity's. num_samples: draws of the intervals; 0 leaves them out."""
    name, _, _ = given.partition("@")
    if name not in RANKERS | GENERATORS:
        raise HeadraceError(f"--model {given}: evaluate knows {', '.join(RANKERS | GENERATORS)}, as NAME or NAME@VERSION")
    if name in GENERATORS and (slice_names or folder):
        raise HeadraceError(f"--slice and --plots are of heads, which {name} has not: they go with {' and '.join(RANKERS)}")
    name, version = registry.find(given)
    loaded = examples.load(export)
    if name in GENERATORS:
        return of_generator(registry, name, version, loaded, num_samples)
    model: Any = RANKERS[name](registry.path(name, version))
    predictions = model.score_rows(loaded, loaded.test_rows)
    report: dict[str, Any] = {
        "model": f"{name}@{version}",
        "protocol": loaded.protocol(),
        "rules": evaluation.RANKING_RULES,
        "trained_on_this_export": registry.manifest(name, version).get("training_sha256") == loaded.fingerprint(),
        "heads": evaluation.ranking(loaded, predictions, num_samples),
        "slices": evaluation.by_slice(loaded, predictions, slice_names, num_samples),
    }
    if folder is not None:
        report["plots"] = [str(path) for path in draw(folder, report, loaded, predictions, num_samples)]
    return report


def of_generator(registry: Registry, name: str, version: str, loaded: Examples, num_samples: int) -> dict[str, Any]:
    """Recall of the notes clicked on the test days, beside what popularity reaches. num_samples: draws of the intervals."""
    model: Any = GENERATORS[name](registry.path(name, version))
    queries = evaluation.RetrievalQueries(loaded, num_samples)
    return {
        "model": f"{name}@{version}",
        "protocol": f"{loaded.protocol()}; {len(queries):,} queries",
        "rules": evaluation.RETRIEVAL_RULES,
        "trained_on_this_export": registry.manifest(name, version).get("training_sha256") == loaded.fingerprint(),
        "heads": {},
        "slices": {},
        "retrieval": {"popularity": queries.popularity(), name: getattr(queries, name)(model)},
    }


def served(lake: Lake, head: str, wait_min: int, num_samples: int = bootstrap.SAMPLES) -> dict[str, Any]:
    """The report of what the forward log predicted for `head`: shown impressions whose wait is over, in SQL; the intervals of
    the same rows, by `num_samples` draws of readers (0: none).

    The base rate of NCE is that of the rows themselves, which no model knew in advance.
    """
    if not lake.exists("lake.forward_log"):
        raise HeadraceError("nothing was served yet: the lake has no lake.forward_log; run `headrace serve` and ask for a feed")
    with lake.reader(("lake.forward_log", "lake.events")) as connection:
        newest = connection.execute("select max(event_ts) - to_minutes($wait::integer) from lake.events", {"wait": wait_min})
        until = newest.fetchone()
        for name in ("forward_log", "events"):
            connection.execute(f"create temp view {name} as select * from lake.{name}")
        values = {"head": head, "until": str(until[0]) if until else None, "wait_min": wait_min}
        connection.execute(f"create temp table scored_rows as {SERVED_ROWS}", values)
        base_rate = connection.sql("select avg(label) from scored_rows").fetchone()
        if base_rate is None or base_rate[0] is None:
            raise HeadraceError(
                f"no shown impression has a prediction of {head!r} and {wait_min} minutes behind it; wait, lower --wait-min or "
                "name a head that the model answers"
            )
        asked = {"base_rate": base_rate[0], "k": NDCG_AT, "bins": metrics.BINS}
        found = connection.execute(METRICS, asked).to_arrow_table().to_pylist()[0]
        rows = connection.sql("select label, score, group_id from scored_rows order by row_id").to_arrow_table()
    for metric in ("ndcg", "map", "recall"):
        found[f"{metric}@{NDCG_AT}"] = found.pop(metric)
    of_head = {name: math.nan if value is None else float(value) for name, value in found.items()}
    if num_samples:
        label_R, score_R, user_R = (rows[name].to_numpy() for name in rows.column_names)
        intervals = bootstrap.of_head(label_R, score_R, user_R.astype(str), base_rate[0], NDCG_AT, num_samples)
        of_head = evaluation.with_intervals(of_head, intervals)
    return {
        "model": f"served, {head}",
        "protocol": f"shown impressions of requests before {values['until']}; positive if {head} within {wait_min} min",
        "rules": evaluation.RANKING_RULES,
        "heads": {head: of_head},
        "slices": {},
    }


def draw(
    folder: Path, report: Mapping[str, Any], loaded: Examples, predictions: Mapping[str, np.ndarray], num_samples: int
) -> list[Path]:
    """Writes `reliability-HEAD.svg`, and `slice-NAME-HEAD.svg` of the AUC, with their intervals, and returns the paths."""
    written = []
    rows = loaded.test_rows
    for head, probability_R in predictions.items():
        labels_R = loaded.labels[head][rows]
        title = f"{report['model']}, {head}: ECE {tables.with_interval('ece', report['heads'][head])}"
        path = folder / f"reliability-{head}.svg"
        users_R = evaluation.users_of(loaded, rows)
        observed = bootstrap.of_bins(labels_R, probability_R, users_R, num_samples) if num_samples else None
        write_out(path, plots.reliability_svg(title, metrics.reliability(labels_R, probability_R), observed).encode())
        written.append(path)
        for name, parts in report["slices"].items():
            lines = [
                (f"{part} ({of[head]['num_rows']:,})", *(of[head].get(at, math.nan) for at in ("auc", "auc_low", "auc_high")))
                for part, of in parts.items()
            ]
            path = folder / f"slice-{name}-{head}.svg"
            title = f"{report['model']}, {head} AUC by {name}"
            write_out(path, plots.slices_svg(title, lines, report["heads"][head]["auc"]).encode())
            written.append(path)
    return written


def _names(given: str) -> list[str]:
    return [name.strip() for name in given.split(",") if name.strip()]


def _print(console: Console, report: Mapping[str, Any]) -> None:
    console.print(f"{report['model']}\n{report['protocol']}", soft_wrap=True, highlight=False)
    if "retrieval" in report:
        console.print(tables.retrieval(report["retrieval"]))
    else:
        console.print(_of_heads(report["heads"]))
    for name, parts in report["slices"].items():
        table = Table(title=f"AUC by {name}", box=SIMPLE_HEAD, pad_edge=False)
        for column in (name, "rows", *report["heads"]):
            table.add_column(column, justify="left" if column == name else "right")
        for part, heads in parts.items():
            num_rows = next(iter(heads.values()))["num_rows"]
            table.add_row(part, f"{num_rows:,}", *(tables.with_interval("auc", values) for values in heads.values()))
        console.print(table)
    console.print(f"rules: {report['rules']}", soft_wrap=True, highlight=False)
    for path in report.get("plots", ()):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)


def _of_heads(heads: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("metric", *heads):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for metric in COLUMNS:
        if any(values.get(metric) is not None for values in heads.values()):
            table.add_row(metric, *(tables.with_interval(metric, values) for values in heads.values()))
    return table
