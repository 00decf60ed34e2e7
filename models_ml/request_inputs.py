"""`FeatureInputs` for one request: the same numbers in a third of the time.

A feature is a row here, so that a step over some features is one pass over contiguous memory, written where it is wanted.
With bins, a feature's share in a linear layer is a broken line of its value; `PiecewiseTable` keeps the layer's outputs at the
corners and blends two of them per feature, where the layer would multiply bins + 1 columns.
N candidates, F raw features, P pairs, Z shaped ones, I inputs of the layer, K members, H outputs of each.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models_ml.features import CUT, STRENGTHS, FeatureInputs


class FeatureRows:
    """Read-only after construction, which copies what `inputs` has learned."""

    def __init__(self, inputs: FeatureInputs):
        self.num_raw, self.num_shaped = len(inputs.names), len(inputs.mean_Z)
        self._ratios = inputs.is_ratio_F.nonzero()[:, 0]
        self._positives_P, self._views_P = inputs.positives_P.clone(), inputs.views_P.clone()
        self._prior_P1 = inputs.prior_P.clone()[:, None]
        self._mean_Z1, self._scale_Z1 = inputs.mean_Z.clone()[:, None], inputs.scale_Z.clone()[:, None]
        self._is_masked_F1 = inputs.is_masked_F.clone()[:, None]

    def inputs(self, values_NF: np.ndarray) -> Tensor:
        """float32 [N, Z + F], what `FeatureInputs` without bins gives; laid out by column."""
        raw_FN = _by_feature(values_NF)
        rows = torch.empty(self.num_shaped + self.num_raw, len(values_NF))
        scaled_ZN, is_null_FN = rows[: self.num_shaped], rows[self.num_shaped :]
        self._fill(raw_FN, scaled_ZN)
        scaled_ZN.nan_to_num_(0.0).clamp_(-CUT, CUT)
        torch.mul(raw_FN.isnan(), self._is_masked_F1, out=is_null_FN)
        return rows.T

    def scaled(self, values_NF: np.ndarray) -> Tensor:
        """float32 [Z, N], the first of these columns, with NaN where the value is NULL."""
        scaled_ZN = torch.empty(self.num_shaped, len(values_NF))
        self._fill(_by_feature(values_NF), scaled_ZN)
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
        place_NZ = place_ZN.T.contiguous()
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


def _by_feature(values_NF: np.ndarray) -> Tensor:
    """float32 [F, N], contiguous."""
    return torch.from_numpy(np.array(values_NF.T, dtype=np.float32, order="C"))
