"""`make quality`: the gates of `quality.json`, each a metric, its bound, its tolerance and its number of runs (seeds).

`benchmark` gates run `headrace benchmark` on a set; `ranking` gates train L2 and the floor on the export of the Headrace home,
into a registry that is thrown away. Hours on two cores: not for CI. What was measured lies in `<home>/benchmark/quality.json`.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from models_ml import examples, train
from models_ml.benchmark import run, sequences
from models_ml.benchmark.published import SETS
from models_ml.configuration import Configs
from models_ml.registry import Registry
from warehouse.errors import HeadraceError
from warehouse.home import Home

GATES = Path(__file__).with_suffix(".json")
RANKING = "ranking"


@dataclass(frozen=True)
class Gate:
    """subject: a set of the benchmark, or `ranking`. metric: a name, or a dotted path into the report of `headrace train`.

    One of at_least and at_most is given; tolerance is how far beyond it still passes.
    """

    subject: str
    metric: str
    runs: int
    tolerance: float
    model: str = ""
    at_least: float | None = None
    at_most: float | None = None

    def passes(self, value: float) -> bool:
        """NaN never does."""
        if self.at_least is not None:
            return value >= self.at_least - self.tolerance
        return self.at_most is not None and value <= self.at_most + self.tolerance

    def bound(self) -> str:
        limit = f">= {self.at_least}" if self.at_least is not None else f"<= {self.at_most}"
        return f"{limit}, tolerance {self.tolerance}" if self.tolerance else limit

    def verdict(self, value: float) -> str:
        word, of = ("PASS" if self.passes(value) else "FAIL"), f"{self.subject} {self.model}".strip()
        return f"{word}  {of} {self.metric} {value:.4f} ({self.bound()}; {self.runs} run{'s' * (self.runs > 1)})"


def read(path: Path) -> list[Gate]:
    """Raises HeadraceError, with the gate's number, for a gate without exactly one bound or with unknown or missing parts."""
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise HeadraceError(f"{path}: cannot be read as JSON: {error}") from error
    gates = []
    for kind, entries in given.items():
        for number, entry in enumerate(entries, start=1):
            where = f"{path}, {kind} gate {number}"
            parts = dict(entry)
            subject = parts.pop("set", None) if kind == "benchmark" else RANKING
            if kind not in ("benchmark", RANKING) or (kind == "benchmark" and subject not in SETS):
                raise HeadraceError(f"{where}: gates are `benchmark`, with a `set` of {', '.join(SETS)}, or `{RANKING}`")
            try:
                gate = Gate(subject=subject, **parts)
            except TypeError as error:
                raise HeadraceError(f"{where}: needs metric, runs, tolerance and at_least or at_most ({error})") from error
            if (gate.at_least is None) == (gate.at_most is None) or gate.runs < 1 or gate.tolerance < 0:
                raise HeadraceError(
                    f"{where}: needs one of at_least and at_most, runs of at least 1 and a tolerance of at least 0"
                )
            gates.append(gate)
    return gates


def benchmark_values(gates: Sequence[Gate], progress: Callable[[str], None], home: Home) -> list[float]:
    """The mean over each gate's runs; the gates share a set."""
    known = SETS[gates[0].subject]
    loaded = sequences.read(known.file(), gates[0].subject)
    seeds = max(gate.runs for gate in gates)
    report = run.run(loaded, ("blend",), seeds, None, progress, home.path / "benchmark")
    return [statistics.fmean(one[gate.metric] for one in report["models"][gate.model]["runs"][: gate.runs]) for gate in gates]


def ranking_values(
    gates: Sequence[Gate], progress: Callable[[str], None], home: Home, configs: Configs | None = None
) -> list[float]:
    """The mean over seeds of L2 and the floor, trained on the export and asked as `headrace train` does."""
    loaded = examples.load(home.exports)
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(max(gate.runs for gate in gates)):
            registry = Registry(Path(folder) / str(seed))
            reports.append(train.train(loaded, ["l2", "floor"], configs or Configs(), seed, registry, lambda *_: None))
            progress(f"l2 and the floor, seed {seed}: trained")
    return [statistics.fmean(value_at(report, gate.metric) for report in reports[: gate.runs]) for gate in gates]


def value_at(report: Mapping[str, Any], path: str) -> float:
    """The number at a dotted path; NaN where the report has null."""
    value: Any = report
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise HeadraceError(
                f"{GATES}: the report has no {path}; at {part!r} it has {', '.join(value) if value else 'nothing'}"
            )
        value = value[part]
    return float("nan") if value is None else float(value)


def main(words: list[str] | None = None) -> int:
    """0 when every gate that could be asked passed, 1 when one failed."""
    parser = argparse.ArgumentParser(prog="python -m models_ml.quality", description="Run the quality gates.")
    parser.add_argument("subjects", nargs="*", help=f"of {', '.join((*SETS, RANKING))} (default: all)")
    parser.add_argument("--gates", type=Path, default=GATES, help=f"another file of gates (default {GATES.name})")
    arguments = parser.parse_args(words)
    gates, home, console = read(arguments.gates), Home.from_env(), Console(stderr=True)
    subjects = arguments.subjects or list(dict.fromkeys(gate.subject for gate in gates))
    unknown = set(subjects) - {gate.subject for gate in gates}
    if unknown:
        raise HeadraceError(f"no gates for {', '.join(sorted(unknown))} in {arguments.gates}")
    results = []
    for subject in subjects:
        some = [gate for gate in gates if gate.subject == subject]
        absent = _absent(subject, home)
        if absent:
            print(f"SKIP  {subject}: {absent}")
            continue
        values = (ranking_values if subject == RANKING else benchmark_values)(
            some, lambda line: console.print(line, highlight=False), home
        )
        for gate, value in zip(some, values, strict=True):
            results.append({**vars(gate), "value": value, "passed": gate.passes(value)})
            print(gate.verdict(value), flush=True)
    folder = home.path / "benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quality.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(result["passed"] for result in results) else 1


def _absent(subject: str, home: Home) -> str | None:
    if subject == RANKING:
        found = (home.exports / "manifest.json").is_file()
        return None if found else f"no export in {home.exports}; run `headrace export-training`"
    return None if SETS[subject].file().exists() else f"{SETS[subject].file()} is not there; set HEADRACE_DATA"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HeadraceError as error:
        print(f"quality: {error}", file=sys.stderr)
        sys.exit(2)
