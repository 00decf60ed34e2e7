"""One set from its sequences to a report: every member by itself, then their blend.

Everything is fitted on what comes before the validation item, as published figures are, and reads the validation item as
history in the test. Nothing is chosen on test items. `blend, refreshed` is the one exception and says so: the members that only
count or solve are fitted again with the validation items, as a system that counts every night would have them.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from models_ml.benchmark import blend, directed, learned, linear, protocol
from models_ml.benchmark.directed import Directed, DirectedConfig
from models_ml.benchmark.linear import Linear
from models_ml.benchmark.popular import Popular
from models_ml.benchmark.protocol import Question, Scorer
from models_ml.benchmark.sequences import Sequences

MODELS = ("popular", "directed", "directed, chosen", "linear", "transformer", "blend")
FLOOR = "directed"

Progress = Callable[[str], None]


def run(
    sequences: Sequences,
    models: Sequence[str],
    seeds: int,
    epochs: int | None,
    progress: Progress,
    checkpoints: Path | None = None,
    device: torch.device | str = "cpu",
    large: bool = False,
    changes: Sequence[str] = (),
) -> dict[str, Any]:
    """The report of `models` (of MODELS): per model its figures, over seeds where it has any.

    seeds: transformers trained, from seed 0 on; the blend is made with each in turn, and once with all of them. epochs: most
    passes over the data; None takes the set's own. checkpoints: a folder in which a run that is cut off leaves what the next
    goes on from. device: of the transformers; large, changes: as `learned.settings` and `learned.changed` have them.
    """
    validation, test = protocol.split(sequences)
    report: dict[str, Any] = {
        "set": sequences.name,
        "protocol": protocol.RULES,
        "num_users": sequences.num_users,
        "num_items": sequences.num_items,
        "num_interactions": len(sequences.items_P),
        "num_asked": len(test.users_Q),
        "models": {},
    }
    wanted = set(MODELS if "blend" in models else models)
    makers = _makers(wanted, validation, progress)
    counted = {name: _counted(name, make, validation, test, report, progress) for name, make in makers.items()}
    if not wanted & {"transformer", "blend"}:
        return report
    config = learned.changed(learned.settings(validation.histories, large), changes)
    config = replace(config, epochs=epochs) if epochs else config
    report["transformer"] = {**asdict(config), "device": str(device)}
    transformers = []
    for seed in range(seeds):
        checkpoint = _checkpoint(checkpoints, sequences, config, seed)
        transformers.append(_trained(validation, test, config, seed, report, progress, checkpoint, device))
    _over_seeds(report, "transformer")
    if "blend" in models:
        refreshed = {name: make(test.histories) for name, make in makers.items() if name != FLOOR}
        _blended(counted, refreshed, transformers, validation, test, report, progress)
    return report


def _makers(wanted: set[str], validation: Question, progress: Progress) -> dict[str, Callable[[Sequences], Scorer]]:
    """The wanted members that no seed changes."""
    makers: dict[str, Callable[[Sequences], Scorer]] = {}
    if "popular" in wanted:
        makers["popular"] = Popular
    if "directed" in wanted:
        makers["directed"] = partial(Directed, config=DirectedConfig())
    if "directed, chosen" in wanted:
        config = directed.choose(validation)
        progress(f"directed, chosen: {config}")
        makers["directed, chosen"] = partial(Directed, config=config)
    if "linear" in wanted and validation.histories.num_items > linear.MOST_ITEMS:
        progress(f"linear: left out, {validation.histories.num_items:,} items are more than {linear.MOST_ITEMS:,}")
    elif "linear" in wanted:
        chosen = linear.choose(validation)
        progress(f"linear: {chosen}")
        makers["linear"] = partial(Linear, config=chosen)
    return makers


def _counted(
    name: str,
    make: Callable[[Sequences], Scorer],
    validation: Question,
    test: Question,
    report: dict[str, Any],
    progress: Progress,
) -> Scorer:
    started = time.monotonic()
    member = make(validation.histories)
    figures = protocol.figures(protocol.places_of(member, test))
    report["models"][name] = {"runs": [figures], "seconds": round(time.monotonic() - started, 1), **figures}
    progress(f"{name}: {_short(figures)}, {time.monotonic() - started:.0f} s")
    return member


def _trained(
    validation: Question,
    test: Question,
    config: learned.TrainingConfig,
    seed: int,
    report: dict[str, Any],
    progress: Progress,
    checkpoint: Path | None,
    device: torch.device | str,
) -> Scorer:
    started = time.monotonic()

    def told(line: str) -> None:
        progress(f"transformer, seed {seed}: {line}")

    model = learned.train(validation, config, seed, told, checkpoint, device)
    figures = protocol.figures(protocol.places_of(model, test))
    runs = report["models"].setdefault("transformer", {"runs": [], "validation": [], "seconds": 0.0})
    runs["runs"].append(figures)
    runs["validation"].append(model.best)
    runs["seconds"] = round(runs["seconds"] + time.monotonic() - started, 1)
    progress(f"transformer, seed {seed}: {_short(figures)}, {time.monotonic() - started:.0f} s")
    return model


def _blended(
    counted: dict[str, Scorer],
    refreshed: dict[str, Scorer],
    transformers: list[Scorer],
    validation: Question,
    test: Question,
    report: dict[str, Any],
    progress: Progress,
) -> None:
    learned_parts = [(f"seed {seed}", transformer) for seed, transformer in enumerate(transformers)]
    if len(transformers) > 1:
        learned_parts.append(("all seeds", blend.Blend(transformers, [1.0] * len(transformers))))
    for label, transformer in learned_parts:
        members = {**{name: member for name, member in counted.items() if name != FLOOR}, "transformer": transformer}
        weights = blend.choose_weights(members, validation)
        for name, made_of in (("blend", members), ("blend, refreshed", {**refreshed, "transformer": transformer})):
            mixed = blend.Blend(list(made_of.values()), list(weights.values()))
            figures = protocol.figures(protocol.places_of(mixed, test))
            key = name if label != "all seeds" else f"{name}, all seeds"
            runs = report["models"].setdefault(key, {"runs": [], "weights": []})
            runs["runs"].append(figures)
            runs["weights"].append(weights)
            progress(f"{name}, {label}: {_short(figures)}, weights {weights}")
    for name in [name for name in report["models"] if name.startswith("blend")]:
        _over_seeds(report, name)


def _over_seeds(report: dict[str, Any], name: str) -> None:
    """Means over the runs, beside each metric's standard deviation."""
    model = report["models"][name]
    for metric in model["runs"][0]:
        values = [run[metric] for run in model["runs"]]
        model[metric] = statistics.fmean(values)
        model[f"{metric}_sd"] = statistics.stdev(values) if len(values) > 1 else None


def _checkpoint(folder: Path | None, sequences: Sequences, config: learned.TrainingConfig, seed: int) -> Path | None:
    """Another set or other settings are another file; another machine is not: what a GPU trained is blended on a CPU."""
    if folder is None:
        return None
    told = json.dumps([asdict(config), seed]).encode() + sequences.items_P.tobytes() + sequences.starts_U1.tobytes()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{sequences.name}-{hashlib.sha256(told).hexdigest()[:12]}.pt"


def _short(figures: dict[str, float]) -> str:
    return f"HR@10 {figures['hr@10']:.4f}, NDCG@10 {figures['ndcg@10']:.4f}"
