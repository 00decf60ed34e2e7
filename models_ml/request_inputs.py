"""`FeatureInputs` and the linear layer after it for requests on a CPU, compiled, from raw values to outputs.

Features of LANES rows are scaled side by side, which a processor does with one instruction for many rows; the layer is summed a
row at a time, some inputs per pass over its outputs. A row's numbers are computed from that row alone, in one order, so they
are the same bit for bit whatever comes with it. Parts of the features are told apart by what they belong to
(`columns_by_owner`): what a note adds may be kept, and what a reader has of a few authors need not be made for every candidate.
With bins, a feature's share in the layer is a broken line of its value: `PiecewiseTable` keeps the layer's outputs at the
corners and blends two of them per feature, where the layer would multiply bins + 1 columns.
N rows, B lanes, F raw features of a part, P pairs, Z shaped ones, S segments, R rows of a table, I inputs of the layer, W
outputs (of all members).
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

_OF_READER, _OF_REQUEST = re.compile(r"^user_"), re.compile(r"_age_min$")
_ZERO, _ONE = np.float32(0), np.float32(1)
LANES = 32
"""Rows whose features are scaled side by side; one row alone costs as much as all. (8 and 16 take a third longer for many rows,
and are no faster for one.)"""
_LOG_2, _INFINITY = np.float32(math.log(2)), np.float32(math.inf)
_ROOT_BITS, _EXPONENT_AT, _FRACTION = np.float32(math.sqrt(0.5)).view(np.int32), np.int32(23), np.int32((1 << 23) - 1)
_A1, _A3, _A5, _A7, _A9 = (np.float32(2 / power) for power in (1, 3, 5, 7, 9))  # of 2 artanh

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
        self._weight_IW = torch.cat([of_scaled, of_null[:, self._masked_M]], dim=1).T.contiguous().numpy()

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
        self._table_RW = table.permute(1, 2, 0, 3).flatten(0, 1).flatten(1).float().contiguous().numpy()

    def add_to(self, out_NW: np.ndarray, values_NF: np.ndarray) -> None:
        _add_blended(values_NF, self._learned, self._start_SZ, self._scale_SZ, self._table_RW, out_NW)


@njit
def _take_log1p(values_B: np.ndarray, sum_B: np.ndarray, bits_B: np.ndarray) -> None:
    """log(1 + x) of x >= 0 in place, within 3e-7 of its size; NaN and infinity stay. bits_B: those of sum_B.

    1 + x = m 2**e with m between sqrt(1/2) and sqrt(2), log m = 2 artanh((m - 1) / (m + 1)), and what 1 + x lost by rounding is
    added back. Nothing but sums, products and quotients, so that it is compiled for many values at a time.
    """
    for b in range(LANES):
        sum_B[b] = _ONE + values_B[b]
    for b in range(LANES):
        value = values_B[b]
        lost = (value - (sum_B[b] - _ONE)) / sum_B[b]
        above = bits_B[b] - _ROOT_BITS
        values_B[b] = np.float32(above >> _EXPONENT_AT) * _LOG_2 + lost if value < _INFINITY else value
        bits_B[b] = (above & _FRACTION) + _ROOT_BITS
    for b in range(LANES):
        root = (sum_B[b] - _ONE) / (sum_B[b] + _ONE)
        square = root * root
        values_B[b] += root * (_A1 + square * (_A3 + square * (_A5 + square * (_A7 + square * _A9))))


@njit
def _scale(values_NF: np.ndarray, start: int, learned: _Learned, raw_FB: np.ndarray, scaled_ZB: np.ndarray) -> None:
    """Of up to LANES rows from `start` on, everything up to the cut and with it; NaN where the value is NULL. A lane without
    a row has zeros."""
    num_raw, num_pairs, rows = len(learned.columns_F), len(learned.prior_P), min(LANES, len(values_NF) - start)
    sum_B = np.empty(LANES, dtype=np.float32)
    bits_B = sum_B.view(np.int32)
    for f in range(num_raw):
        raw_B, scaled_B, column = raw_FB[f], scaled_ZB[f], learned.columns_F[f]
        raw_B[:] = _ZERO
        for b in range(rows):
            raw_B[b] = values_NF[start + b, column]
        if learned.is_ratio_F[f]:
            scaled_B[:] = raw_B
        else:
            for b in range(LANES):
                scaled_B[b] = _ZERO if raw_B[b] <= _ZERO else raw_B[b]
            _take_log1p(scaled_B, sum_B, bits_B)
        for b in range(LANES):
            raw_B[b] = _ZERO if math.isnan(raw_B[b]) else raw_B[b]
    z = num_raw
    for strength in learned.strengths:
        for p in range(num_pairs):
            positives_B, views_B = raw_FB[learned.positives_P[p]], raw_FB[learned.views_P[p]]
            scaled_B, prior = scaled_ZB[z], strength * learned.prior_P[p]
            for b in range(LANES):
                scaled_B[b] = (positives_B[b] + prior) / (views_B[b] + strength)
            z += 1
    cut = learned.cut
    for z in range(len(scaled_ZB)):
        scaled_B, mean, scale = scaled_ZB[z], learned.mean_Z[z], learned.scale_Z[z]
        for b in range(LANES):
            scaled = (scaled_B[b] - mean) * scale
            scaled = cut if scaled > cut else scaled
            scaled_B[b] = -cut if scaled < -cut else scaled


@njit
def _add_row(inputs_I: np.ndarray, weight_IW: np.ndarray, out_W: np.ndarray) -> None:
    """out_W += inputs_I @ weight_IW, eight inputs at a time."""
    num_inputs = len(weight_IW)
    whole = num_inputs - num_inputs % 8
    for i in range(0, whole, 8):
        a, b, c, d = inputs_I[i], inputs_I[i + 1], inputs_I[i + 2], inputs_I[i + 3]
        e, f, g, h = inputs_I[i + 4], inputs_I[i + 5], inputs_I[i + 6], inputs_I[i + 7]
        a_W, b_W, c_W, d_W = weight_IW[i], weight_IW[i + 1], weight_IW[i + 2], weight_IW[i + 3]
        e_W, f_W, g_W, h_W = weight_IW[i + 4], weight_IW[i + 5], weight_IW[i + 6], weight_IW[i + 7]
        for w in range(len(out_W)):
            first = (a * a_W[w] + b * b_W[w]) + (c * c_W[w] + d * d_W[w])
            out_W[w] += first + ((e * e_W[w] + f * f_W[w]) + (g * g_W[w] + h * h_W[w]))
    for i in range(whole, num_inputs):
        a, a_W = inputs_I[i], weight_IW[i]
        for w in range(len(out_W)):
            out_W[w] += a * a_W[w]


@compiled(types.void(_MATRIX, _LEARNED, _PLACES, _MATRIX, types.float32[:, ::1]), error_model="numpy")
def _add_linear(
    values_NF: np.ndarray, learned: _Learned, masked_M: np.ndarray, weight_IW: np.ndarray, out_NW: np.ndarray
) -> None:
    N, Z = len(values_NF), len(learned.mean_Z)
    raw_FB, scaled_ZB = np.empty((len(learned.columns_F), LANES), np.float32), np.empty((Z, LANES), np.float32)
    inputs_I = np.empty(len(weight_IW), np.float32)
    for start in range(0, N, LANES):
        _scale(values_NF, start, learned, raw_FB, scaled_ZB)
        for b in range(min(LANES, N - start)):
            for z in range(Z):
                inputs_I[z] = _ZERO if math.isnan(scaled_ZB[z, b]) else scaled_ZB[z, b]
            for m in range(len(masked_M)):
                inputs_I[Z + m] = _ONE if math.isnan(values_NF[start + b, learned.columns_F[masked_M[m]]]) else _ZERO
            _add_row(inputs_I, weight_IW, out_NW[start + b])


@njit
def _add_corners(row_Z: np.ndarray, share_Z: np.ndarray, rest_Z: np.ndarray, table_RW: np.ndarray, out_W: np.ndarray) -> None:
    """out_W += rest * table_RW[row] + share * table_RW[row + 1] of each, four at a time."""
    whole = len(row_Z) - len(row_Z) % 4
    for z in range(0, whole, 4):
        a, b, c, d = rest_Z[z], rest_Z[z + 1], rest_Z[z + 2], rest_Z[z + 3]
        e, f, g, h = share_Z[z], share_Z[z + 1], share_Z[z + 2], share_Z[z + 3]
        a_W, b_W, c_W, d_W = table_RW[row_Z[z]], table_RW[row_Z[z + 1]], table_RW[row_Z[z + 2]], table_RW[row_Z[z + 3]]
        if e == _ZERO and f == _ZERO and g == _ZERO and h == _ZERO:  # as of most counts, which are 0
            for w in range(len(out_W)):
                out_W[w] += (a * a_W[w] + b * b_W[w]) + (c * c_W[w] + d * d_W[w])
            continue
        e_W, f_W = table_RW[row_Z[z] + 1], table_RW[row_Z[z + 1] + 1]
        g_W, h_W = table_RW[row_Z[z + 2] + 1], table_RW[row_Z[z + 3] + 1]
        for w in range(len(out_W)):
            first = (a * a_W[w] + e * e_W[w]) + (b * b_W[w] + f * f_W[w])
            out_W[w] += first + ((c * c_W[w] + g * g_W[w]) + (d * d_W[w] + h * h_W[w]))
    for z in range(whole, len(row_Z)):
        a, e, a_W, e_W = rest_Z[z], share_Z[z], table_RW[row_Z[z]], table_RW[row_Z[z] + 1]
        for w in range(len(out_W)):
            out_W[w] += a * a_W[w] + e * e_W[w]


@compiled(types.void(_MATRIX, _LEARNED, _MATRIX, _MATRIX, _MATRIX, types.float32[:, ::1]), error_model="numpy")
def _add_blended(
    values_NF: np.ndarray,
    learned: _Learned,
    start_SZ: np.ndarray,
    scale_SZ: np.ndarray,
    table_RW: np.ndarray,
    out_NW: np.ndarray,
) -> None:
    N, (num_segments, Z) = len(values_NF), start_SZ.shape
    raw_FB, scaled_ZB = np.empty((len(learned.columns_F), LANES), np.float32), np.empty((Z, LANES), np.float32)
    place_B = np.empty(LANES, np.float32)
    row_BZ, share_BZ, rest_BZ = (
        np.empty((LANES, Z), np.int64),
        np.empty((LANES, Z), np.float32),
        np.empty((LANES, Z), np.float32),
    )
    for start in range(0, N, LANES):
        rows = min(LANES, N - start)
        _scale(values_NF, start, learned, raw_FB, scaled_ZB)
        for z in range(Z):
            # the cut makes each segment count how much of it lies below the value: whole ones before, a part, none after
            scaled_B = scaled_ZB[z]
            place_B[:] = _ONE
            for s in range(num_segments):
                first, per = start_SZ[s, z], scale_SZ[s, z]
                for b in range(LANES):
                    passed = (scaled_B[b] - first) * per
                    passed = _ONE if passed > _ONE else passed
                    place_B[b] += _ZERO if passed < _ZERO else passed
            for b in range(rows):
                place = _ZERO if math.isnan(place_B[b]) else place_B[b]
                corner = min(int(place), num_segments)
                share = place - np.float32(corner)
                row_BZ[b, z], share_BZ[b, z], rest_BZ[b, z] = z * (num_segments + 2) + corner, share, _ONE - share
        for b in range(rows):
            _add_corners(row_BZ[b], share_BZ[b], rest_BZ[b], table_RW, out_NW[start + b])


@compiled(types.void(_MATRIX, _MATRIX, types.float32[:, ::1]))
def add_products(inputs_NI: np.ndarray, weight_IW: np.ndarray, out_NW: np.ndarray) -> None:
    """out_NW += inputs_NI @ weight_IW, all float32, contiguous. A row's sums are in one order however many rows there are."""
    for n in range(len(inputs_NI)):
        _add_row(inputs_NI[n], weight_IW, out_NW[n])


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
