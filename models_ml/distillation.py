"""L1 learns what L2 would say: each label is mixed with the probability that a trained L2 gives the row.

L1 is there to keep what L2 would choose, out of thousands, and L2's opinion of a row says more than one click or none. Rows of
the test days and heads that the teacher has not keep their labels. Source: Hinton, Vinyals and Dean, 2015; as a ranker's
student, Tang and Wang, KDD 2018.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from models_ml.examples import Examples
from models_ml.request_rows import RequestTable, requests_of


@dataclass(frozen=True)
class DistillationConfig:
    """share: of the teacher's probability in a label of L1, between 0 (labels alone) and 1 (the teacher alone)."""

    share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be between 0 and 1, got {self.share}")


def taught_rows(examples: Examples, said: Mapping[str, np.ndarray], config: DistillationConfig) -> RequestTable:
    """The training rows with mixed labels; NaN, which is not observed, stays NaN.

    said: head -> float32 [training rows], the teacher's probabilities.
    """
    rows, labels = examples.train_rows, dict(examples.labels)
    digest = hashlib.sha256(f"{examples.fingerprint()} {config.share}".encode())
    for head, said_R in said.items():
        mixed_R = labels[head].copy()
        mixed_R[rows] = (1 - config.share) * mixed_R[rows] + config.share * said_R
        labels[head] = mixed_R
        digest.update(mixed_R.tobytes())
    return RequestTable(requests_of(replace(examples, labels=labels), rows), digest.hexdigest())
