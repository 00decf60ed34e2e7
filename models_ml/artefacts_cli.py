"""`headrace export | score | embed | models`: what can be done with a published version."""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from models_ml import batch, export
from models_ml.examples import load, load_spine
from models_ml.registry import Registry
from warehouse.durable import write_out
from warehouse.errors import HeadraceError, disk_full_said
from warehouse.home import Home
from warehouse.lake import Lake


def main(words: list[str]) -> int:
    """words: the command and its arguments. 0 when it is done."""
    return {"export": _export, "score": _score, "embed": _embed, "models": _models}[words[0]](words[1:])


def _parser(command: str, what: str, example: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"headrace {command}",
        description=what,
        epilog=f"example:\n  headrace {command} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if command != "models":
        parser.add_argument(
            "model", metavar="NAME@VERSION", help="such as l2@0003, l2@candidate; without a version: production"
        )
    return parser


def _loaded(home: Home, reference: str) -> tuple[str, str, Any]:
    registry = Registry(home.models)
    name, version = registry.find(reference)
    if name not in export.LOADERS:
        raise HeadraceError(f"model {name} cannot be used here; one of {', '.join(export.LOADERS)} can")
    return name, version, export.LOADERS[name](registry.path(name, version))


def _export(words: list[str]) -> int:
    parser = _parser("export", "Writes a model for other runtimes, once it scores as the server does.", "l2 --format onnx")
    parser.add_argument("--format", choices=tuple(export.FORMATS), required=True)
    parser.add_argument("--out", type=Path, help="the file (default: exported/NAME-VERSION.… in the Headrace home)")
    parser.add_argument("--requests", type=int, default=500, help="on how many requests scores are compared (default 500)")
    parser.add_argument("--export", help="folder or URL of the export the requests come from (default: exports/ in the home)")
    given = parser.parse_args(words)
    if given.requests < 1:
        raise HeadraceError(f"--requests must be at least 1, got {given.requests}")
    home = Home.from_env()
    name, version, model = _loaded(home, given.model)
    path = given.out or home.path / "exported" / f"{name}-{version}{export.FORMATS[given.format]}"
    about = {"model": name, "version": version}
    parity = export.export(model, about, load(given.export or home.exports), given.format, path, given.requests)
    print(
        f"{path}: {parity.requests} requests score as served, to {parity.most_difference:.1e}; "
        f"first {export.TOP} the same on {parity.same_top}, near-equal ones swapped on {parity.swapped_top}"
    )
    return 0


def _score(words: list[str]) -> int:
    parser = _parser(
        "score", "Scores (user_id, note_id) rows with their features.", "l2 --spine rows.parquet --out scored.parquet"
    )
    parser.add_argument(
        "--spine", type=Path, required=True, help="Parquet: user_id, note_id, features by name, perhaps surface"
    )
    parser.add_argument("--out", type=Path, required=True, help="the same rows and a column for each score")
    parser.add_argument("--export", help="folder or URL of the export with the dimensions (default: exports/ in the home)")
    given = parser.parse_args(words)
    home = Home.from_env()
    name, version, model = _loaded(home, given.model)
    examples, table = load_spine(given.spine, given.export or home.exports)
    scored = batch.score(name, model, examples, table)
    stream = io.BytesIO()
    pq.write_table(scored.replace_schema_metadata({"headrace.model": f"{name}@{version}"}), stream)
    write_out(given.out, stream.getvalue())
    print(f"{given.out}: {len(scored):,} rows scored by {name}@{version}")
    return 0


def _embed(words: list[str]) -> int:
    parser = _parser("embed", "Publishes note and reader vectors as dated rows of the lake.", "two_tower")
    parser.add_argument(
        "--export", help="folder or URL of the export with the readers' histories (default: exports/ in the home)"
    )
    given = parser.parse_args(words)
    home = Home.from_env()
    name, version, model = _loaded(home, given.model)
    if name != "two_tower":
        raise HeadraceError(f"model {name} has no vectors of notes and readers; two_tower has")
    with disk_full_said(home.lake):
        written = batch.embed(Lake.open(home), f"{name}@{version}", model, load(given.export or home.exports))
    for table, rows in written.items():
        print(
            f"{table}: {rows:,} vectors of {name}@{version}"
            if rows
            else f"{table}: those of {name}@{version} are there already"
        )
    return 0


def _models(words: list[str]) -> int:
    parser = _parser("models", "Lists versions and moves aliases.", "promote l2@candidate")
    actions = parser.add_subparsers(dest="action", metavar="list | promote | rollback")
    actions.add_parser("list", help="every version, its aliases, its code and data (the default)")
    promote = actions.add_parser("promote", help="make a version production; the one that was becomes previous")
    promote.add_argument("model", metavar="NAME@VERSION")
    rollback = actions.add_parser("rollback", help="make the previous version production again")
    rollback.add_argument("model", metavar="NAME")
    given = parser.parse_args(words)
    registry = Registry(Home.from_env().models)
    if given.action in ("promote", "rollback"):
        reference = given.model if given.action == "promote" else f"{given.model}@previous"
        name, version = registry.find(reference)
        registry.promote(name, version)
        print(f"{name}: production is {version}")
        return 0
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("model", "version", "aliases", "code", "data"):
        table.add_column(column)
    for name in registry.names():
        for version in registry.versions(name):
            manifest = registry.manifest(name, version)
            aliases = ", ".join(alias for alias, target in registry.aliases(name).items() if target == version)
            code, data = manifest.get("code_revision", "–"), str(manifest.get("training_sha256", "–"))[:12]
            table.add_row(name, version, aliases, code, data)
    Console(file=sys.stdout).print(table)
    return 0
