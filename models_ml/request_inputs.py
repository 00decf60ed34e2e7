"""`FeatureInputs` and the linear layer after it for requests on a CPU: a row at a time, compiled, from raw values to outputs.

A row's numbers are computed from that row alone, in one order, so they are the same bit for bit whatever comes with it. Parts
of the features are told apart by what they belong to (`columns_by_owner`): what a note adds may be kept, and what a reader has
of a few authors need not be made for every candidate.
With bins, a feature's share in the layer is a broken line of its value: `PiecewiseTable` keeps the layer's outputs at the
corners and blends two of them per feature, where the layer would multiply bins + 1 columns.
N rows, F raw features of a part, P pairs, Z shaped ones, S segments, I inputs of the layer, W outputs (of all members).
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from models_ml.features import CUT, STRENGTHS, FeatureInputs
from warehouse.compiled import compiled, only_read

BUCKET = 16
"""Rows of candidates, or of histories, are filled up to a multiple of this before PyTorch multiplies them: a row's sums are in
the same order wherever it stands, as long as the number of rows is the same. (Not of 64: a matrix whose rows lie a power of
two apart is a third slower to multiply.)"""
_OF_READER, _OF_REQUEST = re.compile(r"^user_"), re.compile(r"_age_min$")
_ZERO, _ONE = np.float32(0), np.float32(1)

_MATRIX, _PLACES = only_read(types.float32, 2), only_read(types.int64, 1)


class _Learned(NamedTuple):
    """What `FeatureInputs` learned of a part, and how it shapes it: numba's cache of the loops looks at no other file, so what
    stands in one is given to them. columns_F: where the part's features stand among the values of a row."""

    columns_F: np.ndarray
    is_ratio_F: np.ndarray
    positives_P: np.ndarray
    views_P: np.ndarray
    prior_P: np.ndarray
    mean_Z: np.ndarray
    scale_Z: np.ndarray
    strengths: np.ndarray
    cut: np.float32

    @classmethod
    def of(cls, inputs: FeatureInputs, columns: Sequence[int] | None) -> "_Learned":
        own = range(len(inputs.names)) if columns is None else columns
        return cls(
            np.array(own, dtype=np.int64),
            inputs.is_ratio_F.numpy() > 0,
            inputs.positives_P.numpy().copy(),
            inputs.views_P.numpy().copy(),
            inputs.prior_P.numpy().copy(),
            inputs.mean_Z.numpy().copy(),
            inputs.scale_Z.numpy().copy(),
            np.array(STRENGTHS, dtype=np.float32),
            np.float32(CUT),
        )


_LEARNED = types.NamedTuple(
    (*(kind[::1] for kind in (types.int64, types.boolean, *(types.int64,) * 2, *(types.float32,) * 4)), types.float32), _Learned
)


class FeatureShare(Protocol):
    """What some features of a row add to the outputs of a layer."""

    def add_to(self, out_NW: np.ndarray, values_NF: np.ndarray) -> None:
        """out_NW: float32, contiguous, added to in place. values_NF: float32, contiguous, all features of the rows."""


class LinearShare:
    """Without bins. weight_OI: of the layer, for the inputs as `FeatureInputs` orders them; no bias. columns: which of a row's
    values are those of `inputs`; by default all. Read-only after construction, which copies what `inputs` has learned."""

    def __init__(self, inputs: FeatureInputs, weight_OI: Tensor, columns: Sequence[int] | None = None):
        if inputs.bins:
            raise ValueError(f"inputs must be without bins, which a PiecewiseTable is for; got {inputs.bins}")
        self._learned = _Learned.of(inputs, columns)
        self._masked_M = inputs.is_masked_F.nonzero()[:, 0].numpy()
        of_scaled, of_null = weight_OI.split([len(inputs.mean_Z), len(inputs.names)], dim=1)
        self._weight_IW = torch.cat([of_scaled, of_null[:, self._masked_M]], dim=1).T.contiguous().numpy().copy()

    def add_to(self, out_NW: np.ndarray, values_NF: np.ndarray) -> None:
        _add_linear(values_NF, self._learned, self._masked_M, self._weight_IW, out_NW)


class PiecewiseTable:
    """`FeatureInputs` and the linear layers after it, as one table of the layers' outputs.

    weight_KIO: of all K layers, for the inputs as `FeatureInputs` orders them; no bias; their outputs stand side by side.
    columns: as of `LinearShare`. Read-only after construction.
    """

    def __init__(self, inputs: FeatureInputs, weight_KIO: Tensor, columns: Sequence[int] | None = None):
        self._learned = _Learned.of(inputs, columns)
        num_raw, Z, bins = len(inputs.names), len(inputs.mean_Z), inputs.bins
        members, _, width = weight_KIO.shape
        edges_ZE, is_live_ZS = _segments(inputs)
        num_segments = edges_ZE.shape[1] - 1
        live_ZS = is_live_ZS.double()
        span_ZS = edges_ZE.diff(dim=1)
        self._start_SZ = edges_ZE[:, :-1].T.float().numpy().copy()
        self._scale_SZ = torch.where(is_live_ZS, 1 / span_ZS.clamp(min=1e-9), 0.0).T.float().numpy().copy()

        of_scaled, of_null, of_bins = weight_KIO.double().split([Z, num_raw, Z * bins], dim=1)
        of_bins = of_bins.reshape(members, Z, bins, width)
        rise = span_ZS[:, :, None] * of_scaled[:, :, None]  # what each segment adds from one end to the other
        rise[:, :, 1:-1] += of_bins
        rise *= live_ZS[:, :, None]
        # Row 0 answers for NULL, row 1 for the lowest corner, then one for the end of each segment that is alive.
        table = weight_KIO.new_zeros(members, Z, num_segments + 2, width, dtype=torch.float64)
        lowest = edges_ZE[:, :1] * of_scaled
        table[:, :, 1] = lowest
        end_ZS = live_ZS.cumsum(1).long() + 1
        corner = lowest[:, :, None] + rise.cumsum(2)
        table.scatter_(2, end_ZS[None, :, :, None].expand(members, -1, -1, width), corner)
        at_zero_ZB = ((0.0 - inputs.bin_start_ZB) * inputs.bin_scale_ZB).clamp(0.0, 1.0).double()
        table[:, :, 0] = torch.einsum("zb,kzbh->kzh", at_zero_ZB, of_bins)
        table[:, :num_raw, 0] += of_null * inputs.is_masked_F.double()[:, None]
        self._table_ZCW = table.permute(1, 2, 0, 3).flatten(2).float().contiguous().numpy().copy()

    def add_to(self, out_NW: np.ndarray, values_NF: np.ndarray) -> None:
        _add_blended(values_NF, self._learned, self._start_SZ, self._scale_SZ, self._table_ZCW, out_NW)


@njit
def _scaled(values_F: np.ndarray, learned: _Learned, scaled_Z: np.ndarray) -> None:
    """Everything up to the cut and with it; NaN where the value is NULL."""
    num_raw, num_pairs = len(learned.columns_F), len(learned.prior_P)
    for f in range(num_raw):
        raw = values_F[learned.columns_F[f]]
        if not learned.is_ratio_F[f]:
            raw = _ZERO if raw <= _ZERO else math.log1p(raw)
        scaled_Z[f] = raw
    z = num_raw
    for strength in learned.strengths:
        for p in range(num_pairs):
            positives = values_F[learned.columns_F[learned.positives_P[p]]]
            views = values_F[learned.columns_F[learned.views_P[p]]]
            positives = _ZERO if math.isnan(positives) else positives
            views = _ZERO if math.isnan(views) else views
            scaled_Z[z] = (positives + strength * learned.prior_P[p]) / (views + strength)
            z += 1
    cut = learned.cut
    for z in range(len(scaled_Z)):
        scaled = (scaled_Z[z] - learned.mean_Z[z]) * learned.scale_Z[z]
        scaled_Z[z] = cut if scaled > cut else -cut if scaled < -cut else scaled


@njit
def _add(share: np.float32, row_W: np.ndarray, out_W: np.ndarray) -> None:
    for w in range(len(out_W)):
        out_W[w] += share * row_W[w]


@compiled(types.void(_MATRIX, _LEARNED, _PLACES, _MATRIX, types.float32[:, ::1]), error_model="numpy")
def _add_linear(
    values_NF: np.ndarray, learned: _Learned, masked_M: np.ndarray, weight_IW: np.ndarray, out_NW: np.ndarray
) -> None:
    Z = len(learned.mean_Z)
    scaled_Z = np.empty(Z, dtype=np.float32)
    for n in range(len(values_NF)):
        _scaled(values_NF[n], learned, scaled_Z)
        for z in range(Z):
            if not math.isnan(scaled_Z[z]):
                _add(scaled_Z[z], weight_IW[z], out_NW[n])
        for m in range(len(masked_M)):
            if math.isnan(values_NF[n, learned.columns_F[masked_M[m]]]):
                _add(_ONE, weight_IW[Z + m], out_NW[n])


@compiled(
    types.void(_MATRIX, _LEARNED, _MATRIX, _MATRIX, only_read(types.float32, 3), types.float32[:, ::1]), error_model="numpy"
)
def _add_blended(
    values_NF: np.ndarray,
    learned: _Learned,
    start_SZ: np.ndarray,
    scale_SZ: np.ndarray,
    table_ZCW: np.ndarray,
    out_NW: np.ndarray,
) -> None:
    num_segments, Z = start_SZ.shape
    scaled_Z, place_Z = np.empty(Z, dtype=np.float32), np.empty(Z, dtype=np.float32)
    for n in range(len(values_NF)):
        _scaled(values_NF[n], learned, scaled_Z)
        # the cut makes each segment count how much of it lies below the value: whole ones before, a part, none after
        place_Z[:] = _ONE
        for s in range(num_segments):
            for z in range(Z):
                passed = (scaled_Z[z] - start_SZ[s, z]) * scale_SZ[s, z]
                place_Z[z] += _ZERO if passed < _ZERO else _ONE if passed > _ONE else passed
        out_W = out_NW[n]
        for z in range(Z):
            if math.isnan(scaled_Z[z]):
                _add(_ONE, table_ZCW[z, 0], out_W)
                continue
            corner = min(int(place_Z[z]), num_segments)
            share = place_Z[z] - np.float32(corner)
            low_W, high_W = table_ZCW[z, corner], table_ZCW[z, corner + 1]
            if share == _ZERO:  # as of most counts, which are 0
                _add(_ONE, low_W, out_W)
                continue
            for w in range(len(out_W)):
                out_W[w] += (_ONE - share) * low_W[w] + share * high_W[w]


@compiled(types.void(_MATRIX, _MATRIX, types.float32[:, ::1]))
def add_products(inputs_NI: np.ndarray, weight_IW: np.ndarray, out_NW: np.ndarray) -> None:
    """out_NW += inputs_NI @ weight_IW, all float32 and contiguous: for a few rows, or for inputs most of which are 0. A row's
    sums are in one order whatever the number of rows."""
    for n in range(len(inputs_NI)):
        for i in range(len(weight_IW)):
            if inputs_NI[n, i] != _ZERO:
                _add(inputs_NI[n, i], weight_IW[i], out_NW[n])


def columns_by_owner(names: Sequence[str]) -> tuple[list[int], list[int], list[int]]:
    """Of a candidate's features: those of the reader with it, those of the moment, and the rest, of notes and authors."""
    of_reader = [column for column, name in enumerate(names) if _OF_READER.search(name)]
    of_request = [column for column, name in enumerate(names) if _OF_REQUEST.search(name) and column not in of_reader]
    return of_reader, of_request, sorted(set(range(len(names))) - set(of_reader) - set(of_request))


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
