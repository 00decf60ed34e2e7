"""Whether trained candidates may go into production: no worse than what is there, measured on the same rows.

A ranker's AUC is compared with that of the version in production, scored again on the export's test days; L2 must also pass
the floor, and retrieval what learned nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models_ml import evaluation, export
from models_ml.examples import Examples
from models_ml.registry import Registry

MAY_LOSE = 0.002
"""AUC and recall of a new version may be this much lower: days differ by more."""


@dataclass(frozen=True)
class Verdict:
    """One comparison. value and least: of the candidate, and what it had to reach."""

    what: str
    value: float
    least: float

    @property
    def passed(self) -> bool:
        return self.value >= self.least


def judge(examples: Examples, report: Mapping[str, Any], registry: Registry) -> list[Verdict]:
    """report: of `train.train` for the candidates, on these examples. A model without a version in production is not compared
    with one, nor is a head whose AUC in production is not above chance."""
    verdicts = []
    for name in ("l1", "l2"):
        found = registry.production(name)
        if found is None or found == report["versions"].get(name) or name not in report["ranking"]:
            continue
        model = export.LOADERS[name](registry.path(name, found))
        known = set(examples.feature_names)
        if not known.issuperset((*model.user_features, *model.note_features)):
            continue  # its features are gone: it could not be served either
        before = evaluation.ranking(examples, model.score_rows(examples, examples.test_rows))
        for head, values in report["ranking"][name].items():
            # what production has not learned is chance, and so is who is higher
            if head in before and values["auc"] is not None and evaluation.is_learned(before[head]):
                least = before[head]["auc"] - MAY_LOSE
                verdicts.append(Verdict(f"{name} {head} AUC against {found}", values["auc"], least))
    for head, gain in report.get("l2_over_floor", {}).items():
        verdicts.append(Verdict(f"l2 {head} AUC over the floor", gain["auc"], 0.0))
    retrieval = report["retrieval"]
    if {"two_tower", "popularity"} <= retrieval.keys():
        for name in (f"recall@{k}" for k in evaluation.RECALL_AT):
            value, least = (retrieval[generator][name] for generator in ("two_tower", "popularity"))
            verdicts.append(Verdict(f"two_tower {name} over popularity", value, least))
    return verdicts
