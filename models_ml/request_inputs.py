"""`FeatureInputs` for one request: the same numbers in a third of the time.

A feature is a row here, so that a step over some features is one pass over contiguous memory, written where it is wanted.
With bins, a feature's share in a linear layer is a broken line of its value; `PiecewiseTable` keeps the layer's outputs at the
corners and blends two of them per feature, where the layer would multiply bins + 1 columns.
N candidates, F raw features, P pairs, Z shaped ones, I inputs of the layer, K members, H outputs of each.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models_ml.features import CUT, STRENGTHS, FeatureInputs

VECTORS = 32
"""What PyTorch's loops take at a time, four vectors of 8; what is left over at the end they compute another way, and round
differently. Filled up to a multiple, a row's numbers are its own."""
BUCKET, READERS = 16, 8
"""Rows of candidates, or of histories, and of readers are filled up to a multiple of these: a row's sums are in the same order
wherever it stands, as long as the number of rows is the same. (Not of 64: a matrix whose rows lie a power of two apart is a
third slower to multiply.)"""


class FeatureRows:
    """Read-only after construction, which copies what `inputs` has learned.

    columns_I: which of the columns of `inputs`, without bins, `inputs` of this gives; those of features that are never NULL are
    left out, being 0.
    """

    def __init__(self, inputs: FeatureInputs):
        self.num_raw, self.num_shaped = len(inputs.names), len(inputs.mean_Z)
        self._ratios = inputs.is_ratio_F.nonzero()[:, 0]
        self._positives_P, self._views_P = inputs.positives_P.clone(), inputs.views_P.clone()
        self._prior_P1 = inputs.prior_P.clone()[:, None]
        self._mean_Z1, self._scale_Z1 = inputs.mean_Z.clone()[:, None], inputs.scale_Z.clone()[:, None]
        self._masked_M = inputs.is_masked_F.nonzero()[:, 0]
        self.columns_I = torch.cat([torch.arange(self.num_shaped), self.num_shaped + self._masked_M])

    def inputs(self, values_NF: np.ndarray, rows: int | None = None) -> Tensor:
        """float32 [N, Z + M], those columns of what `FeatureInputs` without bins gives; laid out by column. rows: how many to
        give, those after N being of zeros."""
        raw_FN = _by_feature(values_NF, rows)
        inputs_IN = torch.empty(len(self.columns_I), raw_FN.shape[1])
        scaled_ZN, is_null_MN = inputs_IN[: self.num_shaped], inputs_IN[self.num_shaped :]
        self._fill(raw_FN, scaled_ZN)
        scaled_ZN.nan_to_num_(0.0).clamp_(-CUT, CUT)
        masked_MN = raw_FN if len(self._masked_M) == self.num_raw else raw_FN.index_select(0, self._masked_M)
        torch.ne(masked_MN, masked_MN, out=is_null_MN)  # a sixth of isnan() and a product
        return inputs_IN.T

    def scaled(self, values_NF: np.ndarray) -> Tensor:
        """float32 [Z, N filled up], the first of these columns, with NaN where the value is NULL."""
        raw_FN = _by_feature(values_NF, filled_up(len(values_NF), VECTORS))
        scaled_ZN = torch.empty(self.num_shaped, raw_FN.shape[1])
        self._fill(raw_FN, scaled_ZN)
        return scaled_ZN.clamp_(-CUT, CUT)

    def _fill(self, raw_FN: Tensor, scaled_ZN: Tensor) -> None:
        """Everything up to the cut."""
        shaped_FN = scaled_ZN[: self.num_raw]
        torch.clamp(raw_FN, min=0.0, out=shaped_FN)
        shaped_FN.log1p_()
        if len(self._ratios):
            shaped_FN.index_copy_(0, self._ratios, raw_FN.index_select(0, self._ratios))
        num_pairs = len(self._positives_P)
        if num_pairs:
            positives_PN = raw_FN.index_select(0, self._positives_P).nan_to_num_(0.0)
            views_PN = raw_FN.index_select(0, self._views_P).nan_to_num_(0.0)
            for place, strength in enumerate(STRENGTHS):
                rates_PN = scaled_ZN[self.num_raw + place * num_pairs :][:num_pairs]
                torch.add(positives_PN, self._prior_P1, alpha=strength, out=rates_PN)
                rates_PN.div_(views_PN + strength)
        scaled_ZN.sub_(self._mean_Z1).mul_(self._scale_Z1)


class FewRows:
    """`FeatureInputs` in NumPy, whose calls cost a third of PyTorch's: for a reader, or the few features that change from
    request to request. Read-only after construction, which copies what `inputs` has learned."""

    def __init__(self, inputs: FeatureInputs):
        self.num_inputs = inputs.num_inputs
        self._ratios = inputs.is_ratio_F.nonzero()[:, 0].numpy()
        self._positives_P, self._views_P = inputs.positives_P.numpy().copy(), inputs.views_P.numpy().copy()
        self._prior_P, self._mean_Z = inputs.prior_P.numpy().copy(), inputs.mean_Z.numpy().copy()
        self._scale_Z, self._is_masked_F = inputs.scale_Z.numpy().copy(), inputs.is_masked_F.numpy().copy()
        self._start_ZB, self._step_ZB = inputs.bin_start_ZB.numpy().copy(), inputs.bin_scale_ZB.numpy().copy()

    @np.errstate(all="ignore")
    def __call__(self, values_RF: np.ndarray) -> np.ndarray:
        """float32 [R, I]."""
        raw_RF = values_RF.astype(np.float32)
        is_null_RF = np.isnan(raw_RF)
        R, num_raw = raw_RF.shape
        Z, bins = self._start_ZB.shape
        inputs_RI = np.empty((R, self.num_inputs), dtype=np.float32)
        scaled_RZ = inputs_RI[:, :Z]
        shaped_RF = scaled_RZ[:, :num_raw]
        np.maximum(raw_RF, 0.0, out=shaped_RF)
        np.log1p(shaped_RF, out=shaped_RF)
        if len(self._ratios):
            shaped_RF[:, self._ratios] = raw_RF[:, self._ratios]
        num_pairs = len(self._positives_P)
        if num_pairs:
            raw_RF[is_null_RF] = 0.0
            positives_RP, views_RP = raw_RF[:, self._positives_P], raw_RF[:, self._views_P]
            for place, strength in enumerate(STRENGTHS):
                rates_RP = scaled_RZ[:, num_raw + place * num_pairs :][:, :num_pairs]
                np.divide(positives_RP + strength * self._prior_P, views_RP + strength, out=rates_RP)
        scaled_RZ -= self._mean_Z
        scaled_RZ *= self._scale_Z
        scaled_RZ[np.isnan(scaled_RZ)] = 0.0
        np.maximum(scaled_RZ, -CUT, out=scaled_RZ)
        np.minimum(scaled_RZ, CUT, out=scaled_RZ)
        np.multiply(is_null_RF, self._is_masked_F, out=inputs_RI[:, Z : Z + num_raw])
        if bins:
            coded_RZB = scaled_RZ[:, :, None] - self._start_ZB
            coded_RZB *= self._step_ZB
            np.maximum(coded_RZB, 0.0, out=coded_RZB)
            np.minimum(coded_RZB.reshape(R, Z * bins), 1.0, out=inputs_RI[:, Z + num_raw :])
        return inputs_RI


class PiecewiseTable:
    """`FeatureInputs` and the linear layers after it, as one table of the layers' outputs.

    weight_KIO: of all K layers, for the inputs as `FeatureInputs` orders them; no bias. Read-only after construction.
    """

    def __init__(self, inputs: FeatureInputs, weight_KIO: Tensor):
        self._rows = FeatureRows(inputs)
        members, _, width = weight_KIO.shape
        Z, bins = self._rows.num_shaped, inputs.bins
        edges_ZE, is_live_ZS = _segments(inputs)
        num_segments = edges_ZE.shape[1] - 1
        live_ZS = is_live_ZS.double()
        span_ZS = edges_ZE.diff(dim=1)
        self._start_SZ1 = edges_ZE[:, :-1].T[:, :, None].float().contiguous()
        self._scale_SZ1 = torch.where(is_live_ZS, 1 / span_ZS.clamp(min=1e-9), 0.0).T[:, :, None].float().contiguous()

        of_scaled, of_null, of_bins = weight_KIO.double().split([Z, self._rows.num_raw, Z * bins], dim=1)
        of_bins = of_bins.reshape(members, Z, bins, width)
        rise = span_ZS[:, :, None] * of_scaled[:, :, None]  # what each segment adds from one end to the other
        rise[:, :, 1:-1] += of_bins
        rise *= live_ZS[:, :, None]
        # Row 0 answers for NULL, row 1 for the lowest corner, then one for the end of each segment that is alive.
        self._rows_each = num_segments + 2
        table = weight_KIO.new_zeros(members, Z, self._rows_each, width, dtype=torch.float64)
        lowest = edges_ZE[:, :1] * of_scaled
        table[:, :, 1] = lowest
        end_ZS = live_ZS.cumsum(1).long() + 1
        corner = lowest[:, :, None] + rise.cumsum(2)
        table.scatter_(2, end_ZS[None, :, :, None].expand(members, -1, -1, width), corner)
        at_zero_ZB = ((0.0 - inputs.bin_start_ZB) * inputs.bin_scale_ZB).clamp(0.0, 1.0).double()
        table[:, :, 0] = torch.einsum("zb,kzbh->kzh", at_zero_ZB, of_bins)
        table[:, : self._rows.num_raw, 0] += of_null * inputs.is_masked_F.double()[:, None]
        self._tables = table.float().flatten(1, 2).unbind(0)
        self._first_row_Z = (torch.arange(Z) * self._rows_each).float()

    def __call__(self, values_NF: np.ndarray) -> list[Tensor]:
        """float32 [N, H] of each member."""
        scaled_ZN = self._rows.scaled(values_NF)
        passed = scaled_ZN - self._start_SZ1
        # the cut makes each segment count how much of it lies below the value: whole ones before, a part, none after
        place_ZN = passed.mul_(self._scale_SZ1).clamp_(0.0, 1.0).sum(0).add_(1.0).nan_to_num_(0.0)
        place_NZ = place_ZN[:, : len(values_NF)].T.contiguous()
        row_NZ = place_NZ.floor().clamp_(max=self._rows_each - 2)
        N, Z = place_NZ.shape
        rows, shares = torch.empty(N, 2, Z, dtype=torch.int32), torch.empty(N, 2, Z)
        torch.sub(place_NZ, row_NZ, out=shares[:, 1])
        torch.sub(1.0, shares[:, 1], out=shares[:, 0])
        rows[:, 0].copy_(row_NZ.add_(self._first_row_Z))
        torch.add(rows[:, 0], 1, out=rows[:, 1])
        bags_N = torch.arange(0, N * 2 * Z, 2 * Z, dtype=torch.int32)
        return [
            F.embedding_bag(rows.view(-1), table, bags_N, mode="sum", per_sample_weights=shares.view(-1))
            for table in self._tables
        ]


def part_of(inputs: FeatureInputs, columns: Sequence[int]) -> tuple[FeatureInputs, Tensor]:
    """(the same for some of the raw features, int64: the places of its columns among those of `inputs`).

    Parts add up to the whole where none holds one count of a rate without the other. Raises ValueError where one does.
    """
    part = FeatureInputs(tuple(inputs.names[column] for column in columns), inputs.bins)
    raw = {column: place for place, column in enumerate(columns)}
    pairs = list(zip(inputs.positives_P.tolist(), inputs.views_P.tolist(), strict=True))
    if torn := [pair for pair in pairs if (pair[0] in raw) != (pair[1] in raw)]:
        raise ValueError(f"columns must hold both counts of a rate or none, got one of {[inputs.names[c] for c in torn[0]]}")
    of_P = torch.tensor([place for place, pair in enumerate(pairs) if pair[0] in raw], dtype=torch.int64)
    raw_F, num_raw, Z = torch.tensor(list(columns), dtype=torch.int64), len(inputs.names), len(inputs.mean_Z)
    shaped_Z = torch.cat([raw_F, *(num_raw + place * len(pairs) + of_P for place in range(len(STRENGTHS)))])
    bins_I = (Z + num_raw + shaped_Z[:, None] * inputs.bins + torch.arange(inputs.bins)).flatten()
    part.prior_P.copy_(inputs.prior_P[of_P])
    part.is_masked_F.copy_(inputs.is_masked_F[raw_F])
    for name in ("mean_Z", "scale_Z", "bin_start_ZB", "bin_scale_ZB"):
        getattr(part, name).copy_(getattr(inputs, name)[shaped_Z])
    return part, torch.cat([shaped_Z, Z + raw_F, bins_I])


def _segments(inputs: FeatureInputs) -> tuple[Tensor, Tensor]:
    """Corners float64 [Z, bins + 3] from cut to cut ([Z, 2] without bins), and bool: which segments between them are more than
    a point."""
    Z = len(inputs.mean_Z)
    is_live_ZB = inputs.bin_scale_ZB > 0
    start_ZB = inputs.bin_start_ZB.double()
    width_ZB = torch.where(is_live_ZB, 1 / inputs.bin_scale_ZB.double().clamp(min=1e-9), 0.0)
    last_Z1 = start_ZB[:, -1:] + width_ZB[:, -1:]
    cut_Z1 = torch.full((Z, 1), CUT, dtype=torch.float64)
    edges_ZE = torch.cat([-cut_Z1, start_ZB, last_Z1, cut_Z1], dim=1)
    span_ZS = edges_ZE.diff(dim=1)
    is_live_ZS = span_ZS > 1e-6
    is_live_ZS[:, 1:-1] = is_live_ZB
    return edges_ZE, is_live_ZS


def filled_up(rows: int, to: int = BUCKET) -> int:
    """The next multiple."""
    return -(-rows // to) * to


def _by_feature(values_NF: np.ndarray, rows: int | None = None) -> Tensor:
    """float32 [F, N], contiguous; with `rows`, [F, rows]."""
    N, num_features = values_NF.shape
    raw_FN = np.empty((num_features, rows or N), dtype=np.float32)
    raw_FN[:, :N] = values_NF.T
    raw_FN[:, N:] = 0
    return torch.from_numpy(raw_FN)
