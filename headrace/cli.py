"""`headrace COMMAND …`: hands the words to the room that knows the command."""

import importlib
import os
import sys

COMMANDS = {
    "land": ("warehouse.cli", "bring a data set or file of events into the lake"),
    "sql": ("warehouse.cli", "read the lake with SQL, read-only"),
    "lake": ("warehouse.lake_cli", "compact tables, expire snapshots, find orphaned files"),
    "features": ("warehouse.cli", "list, show, check, plan, compute and verify declared features"),
    "features get": ("streaming_sql.features_cli", "the features of one entity, now or then, with the blocks behind them"),
    "export-training": ("warehouse.cli", "write the training examples as Parquet"),
    "stream": ("streaming_sql.cli", "run or inspect the embedded stream"),
    "train": ("models_ml.cli", "train, evaluate and publish the models"),
    "export": ("models_ml.artefacts_cli", "a model as ONNX, TorchScript or torch.export, checked against the served scores"),
    "score": ("models_ml.artefacts_cli", "score the rows of a Parquet file as the server would"),
    "embed": ("models_ml.artefacts_cli", "publish a model's note and reader vectors to the lake, dated"),
    "models": ("models_ml.artefacts_cli", "list versions; promote one, go back to the previous one"),
    "benchmark": ("models_ml.benchmark.cli", "next-item prediction under published protocols"),
    "evaluate": ("models_ml.evaluate_cli", "metrics of a published ranking model, by slice, with plots"),
    "serve": ("serving.cli", "run the HTTP server"),
    "parity": ("serving.cli", "recompute served features from the lake and compare"),
    "workflow": ("headrace.workflow", "features, export, train, gate, publish; skips what has not changed"),
    "demo": ("headrace.demo", "everything, on real data, ending with a feed"),
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: headrace COMMAND [ARGUMENTS]", "", "commands:"]
    lines += [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    lines += ["", "examples:", "  headrace land kuairand", "  headrace COMMAND --help"]
    return "\n".join(lines)


def _verify(words: list[str]) -> int:
    """The one command that spans rooms: the live side is held to the oracle beside the batch side."""
    from streaming_sql.verify import EXECUTION, live_answers
    from warehouse.features import verify

    return verify.main(words, {EXECUTION: live_answers})


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 a check failed, 2 the user can mend it."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    command = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    if command not in COMMANDS:
        print(f"headrace: no command {words[0]!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    from warehouse.errors import HeadraceError
    from warehouse.loading import loading

    with loading():
        room = importlib.import_module(COMMANDS[command][0])
    try:
        return _verify(words[2:]) if words[:2] == ["features", "verify"] else room.main(words)
    except HeadraceError as error:
        print(f"headrace {words[0]}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `| head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
