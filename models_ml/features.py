"""From raw feature values to network inputs, inside the model: what it learned from the training rows travels with the weights.

For each raw feature: log(1 + x) for counts, sums and times (names without `ctr` or `rate`), ratios as they are; NULL (NaN)
becomes the training mean plus a 1 in a mask column; then zero mean and unit spread over the training rows, cut at +-6. For
each pair of counts
that forms a rate, the rate shrunk towards the training prior: (positives + strength * prior) / (views + strength). With
`bins`, each of these Z = F + P * len(STRENGTHS) numbers is also coded piecewise linearly between its training quantiles
(Gorishniy, Rubachev and Babenko, NeurIPS 2022), which lets a small network bend where a tree would split. R rows, F raw
features, P pairs, O = Z + F masks + Z * bins inputs.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

STRENGTHS = (3.0, 20.0)
"""How many views of prior a rate is shrunk by: the small one trusts a short memory, the large one only a long one."""
CUT = 6.0
_POSITIVES = re.compile(r"^(?P<entity>.+)_num_(?:clicks|long_views|likes)_(?P<window>[^_]+)$")
_RATIO = re.compile(r"_(?:ctr|\w*rate)(?:_|$)")
_MASKED_SHARE = 0.001


class FeatureInputs(nn.Module):
    """float64 or float32 [..., F] raw values -> float32 [..., O]. `fit` first; after that all state is in buffers."""

    is_ratio_F: Tensor
    positives_P: Tensor
    views_P: Tensor
    prior_P: Tensor
    mean_Z: Tensor
    scale_Z: Tensor
    is_masked_F: Tensor
    bin_start_ZB: Tensor
    bin_scale_ZB: Tensor

    def __init__(self, names: Sequence[str], bins: int = 0):
        super().__init__()
        self.bins = bins
        self.names = tuple(names)
        place = {name: column for column, name in enumerate(self.names)}
        pairs = []
        for name in self.names:
            match = _POSITIVES.match(name)
            views = f"{match['entity']}_num_views_{match['window']}" if match else None
            if views in place:
                pairs.append((place[name], place[views]))
        self.num_pairs = len(pairs)
        num_raw, num_shaped = len(self.names), len(self.names) + len(pairs) * len(STRENGTHS)
        self.num_inputs = num_shaped + num_raw + num_shaped * bins
        self.register_buffer("is_ratio_F", torch.tensor([float(bool(_RATIO.search(name))) for name in self.names]))
        self.register_buffer("positives_P", torch.tensor([pair[0] for pair in pairs], dtype=torch.int64))
        self.register_buffer("views_P", torch.tensor([pair[1] for pair in pairs], dtype=torch.int64))
        self.register_buffer("prior_P", torch.zeros(len(pairs)))
        self.register_buffer("mean_Z", torch.zeros(num_shaped))
        self.register_buffer("scale_Z", torch.ones(num_shaped))
        self.register_buffer("is_masked_F", torch.zeros(num_raw))
        self.register_buffer("bin_start_ZB", torch.zeros(num_shaped, bins))
        self.register_buffer("bin_scale_ZB", torch.zeros(num_shaped, bins))

    @torch.no_grad()
    def fit(self, train_values_RF: np.ndarray) -> "FeatureInputs":
        """Learns priors, means and spreads; pass training rows only. A feature that is always NULL there becomes a constant
        0."""
        raw_RF = torch.from_numpy(np.ascontiguousarray(train_values_RF)).float()
        is_null_RF = raw_RF.isnan()
        self.is_masked_F.copy_((is_null_RF.float().mean(0) >= _MASKED_SHARE).float())
        known_RF = raw_RF.nan_to_num(0.0)
        views_P = known_RF[:, self.views_P].double().sum(0)
        self.prior_P.copy_(known_RF[:, self.positives_P].double().sum(0) / views_P.clamp(min=1.0))
        unscaled_RZ = self._unscaled(raw_RF)
        known_RZ = (~unscaled_RZ.isnan()).double()
        num_known_Z = known_RZ.sum(0).clamp(min=1.0)
        mean_Z = unscaled_RZ.nan_to_num(0.0).double().sum(0) / num_known_Z
        variance_Z = (((unscaled_RZ.nan_to_num(0.0).double() - mean_Z) * known_RZ) ** 2).sum(0) / num_known_Z
        self.mean_Z.copy_(mean_Z)
        self.scale_Z.copy_(torch.where(variance_Z > 1e-12, variance_Z.rsqrt(), torch.zeros_like(variance_Z)))
        if self.bins:
            edges = np.nanquantile(self._scaled(raw_RF).numpy(), np.linspace(0, 1, self.bins + 1), axis=0).T
            width_ZB = torch.from_numpy(np.diff(edges, axis=1)).float()
            self.bin_start_ZB.copy_(torch.from_numpy(edges[:, :-1]))
            self.bin_scale_ZB.copy_(torch.where(width_ZB > 1e-6, 1 / width_ZB, torch.zeros_like(width_ZB)))
        return self

    def forward(self, values: Tensor) -> Tensor:
        raw = values.float()
        scaled = self._scaled(raw)
        parts = [scaled, raw.isnan().float() * self.is_masked_F]
        if self.bins:
            coded = (scaled.unsqueeze(-1) - self.bin_start_ZB) * self.bin_scale_ZB
            parts.append(coded.clamp(0.0, 1.0).flatten(-2))
        return torch.cat(parts, dim=-1)

    def _scaled(self, raw: Tensor) -> Tensor:
        return ((self._unscaled(raw) - self.mean_Z) * self.scale_Z).nan_to_num(0.0).clamp(-CUT, CUT)

    def _unscaled(self, raw: Tensor) -> Tensor:
        """[..., F + P * strengths], NaN where the raw value is NULL."""
        # a blend by a 0/1 row, and index_select: where() and fancy indexing take several times as long on 2,000 candidates
        shaped = torch.log1p(raw.clamp(min=0.0)) * (1.0 - self.is_ratio_F) + raw * self.is_ratio_F
        known = raw.nan_to_num(0.0)
        positives, views = known.index_select(-1, self.positives_P), known.index_select(-1, self.views_P)
        rates = [(positives + strength * self.prior_P) / (views + strength) for strength in STRENGTHS]
        return torch.cat([shaped, *rates], dim=-1)
