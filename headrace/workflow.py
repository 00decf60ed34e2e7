"""`headrace workflow`: features, export, train, gate, publish; a stage is skipped when its inputs are as they were.

What a stage was last done with is kept in `<home>/workflow.json`, written after each stage: a run that was cut off goes on
where it was, training from its last checkpoint.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from headrace.children import exit_when_told, started
from models_ml import gate, train
from models_ml.examples import load
from models_ml.registry import Registry
from warehouse.durable import replace_file
from warehouse.errors import HeadraceError
from warehouse.features.declarations import declarations_hash, load_groups
from warehouse.home import REPOSITORY, Home
from warehouse.lake import Lake
from warehouse.training_export import EXAMPLES

STATE = "workflow.json"
STAGES = ("features", "export", "train", "gate", "publish")
_SOURCES = ("lake.events", "lake.notes", "lake.users")
_MODELS = ("item_to_item", "two_tower", "l1", "l2")


def main(words: list[str]) -> int:
    """0 when the candidates are in production, 1 when the gate kept them out."""
    parser = argparse.ArgumentParser(
        prog="headrace workflow",
        description="From landed events to models in production: features, export, train, gate, publish. "
        "Stages whose inputs have not changed are skipped.",
    )
    parser.add_argument("--config", type=Path, help="YAML of settings, as for `headrace train`")
    parser.add_argument("--again", choices=STAGES, help="do this stage, and what follows, whatever its inputs")
    given = parser.parse_args(words[1:])
    exit_when_told()
    workflow = Workflow(Home.from_env(), given.config, Console(stderr=True))
    return workflow.run(given.again)


class Workflow:
    def __init__(self, home: Home, config: Path | None, console: Console):
        self.home, self.config, self.console = home, config, console
        self.path = home.path / STATE
        try:
            self.state: dict[str, Any] = json.loads(self.path.read_text())
        except (OSError, ValueError):
            self.state = {}

    def run(self, again: str | None = None) -> int:
        if again is not None:
            for name in STAGES[STAGES.index(again) :]:
                self.state.pop(name, None)
        self._stage("features", self._features_inputs, lambda: self._dbt("build"))
        self._stage("export", self._export_inputs, lambda: self._headrace("export-training"))
        self._stage("train", self._train_inputs, self._train)
        self._stage("gate", self._gate_inputs, self._gate)
        if not self.state["gate"]["passed"]:
            self.console.print("the gate kept the candidates out; production is as it was")
            return 1
        self._stage("publish", lambda: self.state["train"]["versions"], self._publish)
        return 0

    def _stage(self, name: str, inputs: Callable[[], Any], do: Callable[[], dict[str, Any] | None]) -> None:
        """Does a stage unless it was done with these inputs. `inputs` is asked before it begins."""
        key = hashlib.sha256(json.dumps(inputs(), sort_keys=True).encode()).hexdigest()
        before = self.state.get(name, {})
        if before.get("done") == key:
            self.console.print(f"{name}: as before, skipped", highlight=False)
            return
        resumed = before.get("begun") == key
        self._write(name, {"begun": key})
        started = time.monotonic()
        self._resume = resumed
        found = do() or {}
        seconds = round(time.monotonic() - started, 1)
        self._write(name, {"done": key, "seconds": seconds, **found})
        self.console.print(f"{name}: done in {seconds} s", highlight=False)

    def _write(self, name: str, record: dict[str, Any]) -> None:
        self.state[name] = record
        self.home.path.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, (json.dumps(self.state, indent=1) + "\n").encode())

    def _features_inputs(self) -> Any:
        sql = sorted((REPOSITORY / "warehouse").rglob("*.sql")) + sorted((REPOSITORY / "warehouse" / "models").rglob("*.yml"))
        code = hashlib.sha256(b"".join(path.read_bytes() for path in [*sql, REPOSITORY / "dbt_project.yml"])).hexdigest()
        return [self._snapshots(_SOURCES), declarations_hash(load_groups()), code]

    def _export_inputs(self) -> Any:
        return self._snapshots((EXAMPLES, "lake.notes", "lake.users"))

    def _train_inputs(self) -> Any:
        return [load(self.home.exports).fingerprint(), self.config.read_text() if self.config else None, train.code_revision()]

    def _gate_inputs(self) -> Any:
        registry = Registry(self.home.models)
        return [self.state["train"]["versions"], {name: registry.production(name) for name in _MODELS}]

    def _snapshots(self, tables: tuple[str, ...]) -> dict[str, int | None]:
        lake = Lake.open(self.home)
        missing = [name for name in tables if not lake.exists(name)]
        if missing:
            raise HeadraceError(f"the lake has no table {', '.join(missing)}; run `headrace land` first")
        return {name: lake.table(name).metadata.current_snapshot_id for name in tables}

    def _train(self) -> dict[str, Any]:
        words = [
            "--no-promote",
            *(["--config", str(self.config)] if self.config else []),
            *(["--resume"] if self._resume else []),
        ]
        self._headrace("train", "all", *words)
        report = json.loads((self.home.models / train.REPORT).read_text())
        return {"versions": report["versions"]}

    def _gate(self) -> dict[str, Any]:
        report = json.loads((self.home.models / train.REPORT).read_text())
        verdicts = gate.judge(load(self.home.exports), report, Registry(self.home.models))
        for verdict in verdicts:
            sign = "passed" if verdict.passed else "FAILED"
            self.console.print(f"  {sign}  {verdict.what}: {verdict.value:.4f}, least {verdict.least:.4f}", highlight=False)
        return {"passed": all(verdict.passed for verdict in verdicts)}

    def _publish(self) -> None:
        registry = Registry(self.home.models)
        for name, version in self.state["train"]["versions"].items():
            registry.promote(name, version)

    def _headrace(self, *words: str) -> None:
        self._child([sys.executable, "-m", "headrace.cli", *words], f"headrace {words[0]}")

    def _dbt(self, *words: str) -> None:
        self._child([str(Path(sys.executable).with_name("dbt")), *words], f"dbt {words[0]}")

    def _child(self, command: list[str], name: str) -> None:
        with started(command) as process:
            status = process.wait()
        if status != 0:
            raise HeadraceError(f"`{name}` ended with status {status}; see above, mend it and run `headrace workflow` again")
