"""Export in, published models and one report out: the order of the stages is the order of `MODELS`.

The floor (LightGBM, which holds no Python lock while it works) trains beside the networks on the other core.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from models_ml import calibration, distillation, evaluation, floor, item_to_item, l1, l2, request_rows, two_tower, vector_search
from models_ml.configuration import Configs
from models_ml.examples import Examples
from models_ml.registry import Registry
from models_ml.request_rows import AnyRows, RequestRows, RequestTable
from models_ml.shards import Shards
from models_ml.trainer.fit import Run
from models_ml.trainer.ranks import ALONE, Ranks
from warehouse.durable import replace_file
from warehouse.errors import HeadraceError
from warehouse.home import REPOSITORY, Home

MODELS = ("item_to_item", "two_tower", "l2", "l1", "floor")
REPORT = "report.json"

Progress = Callable[[str, int, int], None]
"""(model, steps done, steps in all)"""


@dataclass(frozen=True)
class Options:
    """How a run is carried out. work: folder of request rows and checkpoints; None trains in memory and keeps none.
    promote: move `production` too, not `candidate` alone. say: one line for a person."""

    ranks: Ranks = ALONE
    work: Path | None = None
    resume: bool = False
    promote: bool = True
    say: Callable[[str], None] = lambda line: None


class _Run:
    """What one `train` call has so far: predictions and metrics per model, seconds, versions."""

    def __init__(
        self, examples: Examples, configs: Configs, seed: int, registry: Registry, progress: Progress, options: Options
    ):
        self.examples, self.configs, self.seed, self.registry, self.progress = examples, configs, seed, registry, progress
        self.options = options
        self._rows: AnyRows | None = None
        self.predictions: dict[str, dict[str, np.ndarray]] = {}
        self.ranking: dict[str, Any] = {}
        self.retrieval: dict[str, Any] = {}
        self.index_recall: dict[str, dict[str, float]] = {}
        self.seconds: dict[str, float] = {}
        self.versions: dict[str, str] = {}
        self._queries: evaluation.RetrievalQueries | None = None

    @property
    def rows(self) -> AnyRows:
        """The training rows; the first rank writes them where there is a folder for them."""
        if self._rows is None:
            options = self.options
            if place := self.configs.trainer.request_rows:
                self._rows = self._rows_at(place)
            elif options.work is None:
                self._rows = RequestTable.of_examples(self.examples)
            else:
                if options.ranks.is_first:
                    request_rows.of_examples(self.examples, options.work / "request_rows")
                options.ranks.meet("writing request rows")
                self._rows = RequestRows(options.work / "request_rows")
        return self._rows

    def _rows_at(self, place: str) -> RequestRows:
        """Raises HeadraceError when they are another export's."""
        rows = RequestRows(Shards(place, self.configs.trainer.cache_of(place)))
        if (of := rows.manifest.get("training_sha256")) != self.examples.fingerprint():
            raise HeadraceError(
                f"trainer.request_rows: the rows at {rows.shards.told} are of the export {of}, "
                f"this one is {self.examples.fingerprint()}; train without that setting and copy "
                f"{self.options.work or Home.from_env().training}/request_rows there"
            )
        return rows

    def _run_of(self, name: str) -> Run:
        options = self.options
        folder = None if options.work is None else options.work / name
        return Run(
            self.configs.trainer, options.ranks, folder, options.resume, say=options.say, measure=options.work is not None
        )

    @property
    def queries(self) -> evaluation.RetrievalQueries:
        self._queries = self._queries or evaluation.RetrievalQueries(self.examples)
        return self._queries

    def item_to_item(self) -> None:
        self.progress("item_to_item", 0, 1)
        neighbours = item_to_item.train(self.examples, self.configs.item_to_item)
        self.progress("item_to_item", 1, 1)
        recall = self.queries.item_to_item(item_to_item.ItemToItem(neighbours, self.configs.item_to_item.seed_decay))
        self.retrieval |= {"popularity": self.queries.popularity(), "item_to_item": recall}
        self._publish("item_to_item", item_to_item.to_files(neighbours, self.configs.item_to_item), recall)

    def two_tower(self) -> None:
        model = two_tower.train(
            self.examples, self.configs.two_tower, self.seed, self._progress_of("two_tower"), self._run_of("two_tower")
        )
        if not self.options.ranks.is_first:
            return
        recall = self.queries.two_tower(model)
        self.retrieval |= {"popularity": self.queries.popularity(), "two_tower": recall}
        readers_QD = self.queries.vectors_of_readers(model)
        self.index_recall = vector_search.recall_of_indexes(model.note_vectors, readers_QD, evaluation.RECALL_AT)
        self._publish("two_tower", model.to_files(), recall, about={"index_recall": self.index_recall})

    def l1(self) -> None:
        rows, about = self.rows, {}
        if self.configs.distillation.share:
            # the L2 of this run, or else the one in production; the first rank's, which alone is calibrated
            said = None
            if self.options.ranks.is_first:
                teacher = self.versions.get("l2") or self.registry.resolve("l2")
                about = {"teacher": f"l2@{teacher}", "distillation": asdict(self.configs.distillation)}
                said = l2.load(self.registry.path("l2", teacher)).score_rows(self.examples, self.examples.train_rows)
            said = self.options.ranks.share(said)
            rows = distillation.taught_rows(self.examples, said, self.configs.distillation)
        model = l1.train(self.examples, self.configs.l1, self.seed, self._progress_of("l1"), rows, self._run_of("l1"))
        if not self.options.ranks.is_first:
            return
        self._rank("l1", model.score_rows(self.examples, self.examples.test_rows))
        self._publish("l1", model.to_files(), self.ranking["l1"], model, about)

    def l2(self) -> None:
        model = l2.train(self.examples, self.configs.l2, self.seed, self._progress_of("l2"), self.rows, self._run_of("l2"))
        if not self.options.ranks.is_first:
            return
        config = self.configs.l2
        if config.rehearsal_days:
            earlier = partial(l2.train, config=config, seed=self.seed, progress=lambda done, total: None)
            model.rescale(calibration.rehearsed(self.examples, earlier, config.rehearsal_days))
        self._rank("l2", model.score_rows(self.examples, self.examples.test_rows))
        self._publish("l2", model.to_files(), self.ranking["l2"], model)

    def floor(self, threads: int) -> None:
        progress = self._progress_of("floor")
        predictions = floor.predict_test(self.examples, self.configs.floor, self.seed, progress, threads)
        self._rank("floor", predictions)

    def _progress_of(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(name, done, total)

    def _rank(self, name: str, predictions: dict[str, np.ndarray]) -> None:
        self.predictions[name] = predictions
        self.ranking[name] = evaluation.ranking(self.examples, predictions)

    def _publish(
        self,
        name: str,
        files: Mapping[str, bytes],
        metrics: Mapping[str, Any],
        model: Any = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        features = {"user_features": model.user_features, "note_features": model.note_features} if model else {}
        manifest = {
            "config": asdict(getattr(self.configs, name)),
            "seed": self.seed,
            "metrics": evaluation.nullable(metrics),
            "protocol": self.examples.protocol(),
            "training": self.examples.manifest,
            "training_sha256": self.examples.fingerprint(),
            "snapshots": self.examples.manifest.get("snapshots"),
            "declarations_hash": self.examples.manifest.get("declarations_hash"),
            "code_revision": code_revision(),
            **features,
            **(about or {}),
        }
        published = self.registry.publish(name, files, manifest)
        self.registry.set_alias(name, "candidate", published)
        if self.options.promote:
            self.registry.promote(name, published)
        self.versions[name] = published


def train(
    examples: Examples,
    names: Sequence[str],
    configs: Configs,
    seed: int,
    registry: Registry,
    progress: Progress,
    options: Options = Options(),
) -> dict[str, Any]:
    """Trains, evaluates and publishes the named models (of MODELS), moves their `production` alias, and returns the report.

    Over several ranks all train; the first alone evaluates, publishes and has a report, the others return {}.

    The report is also written to `<registry>/report.json`; models of the last run on the same export that are not named keep
    their part.
    """
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise ValueError(f"models must be of {', '.join(MODELS)}, got {', '.join(unknown)}")
    run = _Run(examples, configs, seed, registry, progress, options)
    if not options.ranks.is_first:
        for name in ("two_tower", "l2", "l1"):
            if name in names:
                getattr(run, name)()
        return {}
    with ThreadPoolExecutor(max_workers=1) as other_core:
        beside: Future | None = None
        if "floor" in names:
            beside = other_core.submit(_timed, run, "floor", lambda: run.floor(threads=1 if len(names) > 1 else 2))
        for name in MODELS[:-1]:
            if name in names:
                _timed(run, name, getattr(run, name))
        if beside is not None:
            beside.result()
    report = _report(run)
    _write_report(registry.root / REPORT, report)
    return report


@cache
def code_revision() -> str:
    """The commit the code is at, `-dirty` when files differ from it; the version of the package where there is no git."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return f"headrace {version('headrace')}"


def _timed(run: _Run, name: str, stage: Callable[[], None]) -> None:
    started = time.monotonic()
    stage()
    run.seconds[name] = round(time.monotonic() - started, 1)


def _report(run: _Run) -> dict[str, Any]:
    examples = run.examples
    before = _read_report(run.registry.root / REPORT)
    if before.get("training_sha256") != examples.fingerprint():
        before = {}
    report: dict[str, Any] = {
        "protocol": examples.protocol(),
        "training_sha256": examples.fingerprint(),
        "rules": {"ranking": evaluation.RANKING_RULES, "retrieval": evaluation.RETRIEVAL_RULES},
        "rows": {"train": len(examples.train_rows), "test": len(examples.test_rows)},
        "seed": run.seed,
    }
    for part in ("ranking", "retrieval", "index_recall", "seconds", "versions"):
        report[part] = before.get(part, {}) | getattr(run, part)
    report["not_learned"] = {
        name: not_learned for name, heads in report["ranking"].items() if (not_learned := _not_learned(examples, heads))
    }
    report["l2_over_floor"] = before.get("l2_over_floor", {})
    if run.predictions.keys() >= {"l2", "floor"}:
        report["l2_over_floor"] = evaluation.gain(examples, run.predictions["l2"], run.predictions["floor"])
    elif run.predictions.keys() & {"l2", "floor"}:
        report["l2_over_floor"] = {}  # one of the two has changed: the old comparison is no longer true
    return evaluation.nullable(report)


def _not_learned(examples: Examples, heads: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Head -> how many positive rows there are to learn from and to test on, of heads that are not above chance."""
    sides = {"train": examples.train_rows, "test": examples.test_rows}
    return {
        head: {f"positives_{side}": int(np.nansum(examples.labels[head][rows])) for side, rows in sides.items()}
        for head, values in heads.items()
        if not evaluation.is_learned(values)
    }


def _read_report(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _write_report(path: Path, report: Mapping[str, Any]) -> None:
    replace_file(path, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    from models_ml.cli import main_of_rank

    sys.exit(main_of_rank(sys.argv[1:]))
