"""What L1 and L2 read of request rows, and how a batch of them becomes tensors.

R requests of a batch, P lanes of C candidates (`trainer.rows.lanes`), T heads.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from kernels.multitask_bce import multitask_bce
from models_ml import request_rows
from models_ml.examples import distinct
from models_ml.features import FeatureInputs
from models_ml.request_rows import AnyRows
from models_ml.scoring import default_surface
from models_ml.trainer.rows import Rows, in_lanes, lanes

LANE_OF = "reader_of_lane"


def rows_of(
    table: pa.Table,
    row_ids: np.ndarray,
    user_features: Sequence[str],
    note_features: Sequence[str],
    surfaces: Sequence[str],
    heads: Sequence[str],
) -> Rows:
    """user [R, Fu], surface [R]; features [N, Fn], labels [N, T] (NaN where not observed)."""
    return Rows(
        row_ids,
        {
            "user": request_rows.numbers(table, user_features),
            "surface": request_rows.codes(table["surface"], pa.array(surfaces, pa.string())),
        },
        {
            "features": request_rows.numbers(table, note_features),
            "labels": request_rows.numbers(table, [f"label_{head}" for head in heads]),
        },
        request_rows.offsets_of(table),
    )


def tensors_of(rows: Rows) -> dict[str, Tensor]:
    """Per request as it is, per candidate in lanes; `reader_of_lane` int64 [P] unless each request is one lane. Labels of
    empty places are NaN, which the loss leaves out."""
    rows = rows.or_empty_row()
    row_P, place_PC = lanes(rows.offsets)
    batch = {name: torch.from_numpy(part) for name, part in rows.per_row.items()}
    for name, part in rows.per_candidate.items():
        batch[name] = torch.from_numpy(in_lanes(part, place_PC, float("nan") if name == "labels" else 0))
    if len(row_P) != len(rows):
        batch[LANE_OF] = torch.from_numpy(row_P)
    return batch


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits [B, T], mean over the heads, summed over the B candidates."""
    weight_T = logits.new_full((logits.shape[1],), 1 / logits.shape[1], dtype=torch.float32)
    return multitask_bce(logits.float(), labels, weight_T) * logits.shape[0]


class Facts:
    """What is learned of the rows before training: the surfaces there are, the usual one, base rates of the heads [T]."""

    def __init__(self, rows: AnyRows, user_features: Sequence[str], note_features: Sequence[str], heads: Sequence[str]):
        labels = [f"label_{head}" for head in heads]
        self._table = request_rows.sample(rows, ["surface", "note_id", *user_features, *note_features, *labels])
        surface = self._table["surface"].cast(pa.string())
        self.surfaces = distinct(surface)
        self.default_surface = default_surface(request_rows.codes(surface, pa.array(self.surfaces, pa.string())), self.surfaces)
        self._user_features, self._note_features = user_features, note_features
        self.base_rate_T = np.nanmean(request_rows.numbers(self._table, labels).astype(np.float64), axis=0)

    def fit(self, user_inputs: FeatureInputs, note_inputs: FeatureInputs) -> None:
        """Means, spreads and bins of the features; those of the reader count once for each candidate."""
        counts = np.diff(request_rows.offsets_of(self._table))
        user_inputs.fit(np.repeat(request_rows.numbers(self._table, self._user_features), counts, axis=0))
        note_inputs.fit(request_rows.numbers(self._table, self._note_features))


def set_bias(bias: nn.Parameter, base_rate_T: np.ndarray) -> None:
    """So that an untrained head answers its base rate."""
    with torch.no_grad():
        logit_T = torch.logit(torch.from_numpy(base_rate_T).float().clamp(1e-4, 1 - 1e-4))
        bias.copy_(logit_T.expand_as(bias))
