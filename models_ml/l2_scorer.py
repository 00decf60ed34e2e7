"""L2 for requests on a CPU: what `L2Network` says of their candidates, in a fraction of the time.

Weights are multiplied out once, when the model is loaded: the members' matrices, the query's matrix into the key's, norms into
the layers after them, features and their bins into tables (`PiecewiseTable`). What a note adds by itself is kept from request
to request (`RowMemo`). Only places that hold a note are computed, so padding costs nothing.

Several requests may come in one call: what is computed row by row (features, norms, layers) is computed for all their rows
together, attention request by request. Rows are filled up to a multiple of `request_inputs.BUCKET`, so that a request's scores
do not depend on which others came with it: bit for bit where the bucket is the same, else to the rounding of a sum.
R requests, N candidates of all, n places of all histories that hold a known note, D width, K members, H hidden units, T heads.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models_ml.first_layer import FirstLayer
from models_ml.l2_network import HistoryLayer, L2Network, MemberLinear
from models_ml.request_inputs import PiecewiseTable, add_products, filled_up
from models_ml.row_memo import RowMemo
from models_ml.scoring import Notes


class Asked(NamedTuple):
    """One request. user [Fu], notes: raw features, NaN for NULL. attributes: 0 and 1. history: int64
    codes, newest first, at most as many as there are places; codes, rows: int64 [N]. Code 0 is an unknown note; a note's row
    is where what it adds is kept, -1 for nowhere."""

    user: np.ndarray
    surface: int
    attributes: np.ndarray
    history: np.ndarray
    codes: np.ndarray
    rows: np.ndarray
    notes: Notes


class L2Scorer:
    """Copies the network's weights when it is made. Safe for threads. table_ND: `notes.table()`."""

    @torch.inference_mode()
    def __init__(self, network: "L2Network", table_ND: Tensor):
        self._table_ND, self._place_LD = table_ND, network.place
        width = self._width = network.config.width
        self._layers = [_HistoryLayer(cast("HistoryLayer", layer), width) for layer in network.history_layers]

        # query . key = note . (Wq' Wk h + Wq' bk) + bq . (Wk h + bk): one product of the history, none of the candidates
        (query, query_bias), (key, key_bias), (value, value_bias) = (
            (layer.weight.double(), layer.bias.double()) for layer in (network.query, network.key, network.value)
        )
        scale = 1 / math.sqrt(width)
        weight = torch.cat([query.T @ key * scale, (query_bias @ key * scale)[None], value])
        bias = torch.cat([query.T @ key_bias * scale, (query_bias @ key_bias * scale)[None], value_bias])
        self._read_weight, self._read_bias = _after_norm(network.history_norm, weight, bias)

        num_user, num_note = network.user_inputs.num_inputs, network.note_inputs.num_inputs
        user_KIH, note_KIH = matrices(network.first_user), matrices(network.first_note)
        self._members, _, hidden = note_KIH.shape
        of_surface, of_attributes, of_mean, of_count = user_KIH[:, num_user:].split([8, 16, width, 1], dim=1)
        assert network.first_user.bias is not None
        bias_KH = network.first_user.bias[:, 0] + network.attributes.bias @ of_attributes
        self._of_surface_SW = (torch.einsum("se,keh->skh", network.surface.weight, of_surface) + bias_KH).flatten(1).numpy()
        self._of_attributes_AW = torch.einsum("ea,keh->akh", network.attributes.weight, of_attributes).flatten(1).numpy()
        self._of_user = PiecewiseTable(network.user_inputs, user_KIH[:, :num_user])
        # the mean of what the history says, how long it is
        self._of_history_EW = _side_by_side(torch.cat([of_mean, of_count], dim=1)).numpy()

        of_features, of_embedding, of_read, of_likeness = note_KIH.split([num_note, width, 2 * width, 1], dim=1)
        self._of_embedding_DW = _side_by_side(of_embedding).numpy()
        # what a note reads, its product with the note, likeness to the mean
        self._of_read_EW = _side_by_side(torch.cat([of_read, of_likeness], dim=1))
        self._first = FirstLayer(
            network.note_inputs,
            self._members * hidden,
            lambda part, places_I, columns: PiecewiseTable(part, of_features[:, places_I], columns),
            self._add_of_notes,
        )

        assert network.second.bias is not None
        self._second_KHH, self._second_bias_K1H = matrices(network.second), network.second.bias.clone()
        self._last_KTH = network.last_KHT.transpose(1, 2).contiguous()
        self._last_bias_KT1 = network.last_bias_KT.transpose(1, 2).contiguous()

    @torch.inference_mode()
    def __call__(self, asked: Sequence[Asked]) -> list[np.ndarray]:
        """float32 [T, its candidates] probabilities of each request."""
        ends = [0, *accumulate(len(request.codes) for request in asked)]
        spans = [slice(*ends) for ends in pairwise(ends)]
        N, width = ends[-1], self._width
        codes_N = np.concatenate([request.codes for request in asked])

        note_ND = self._table_ND.index_select(0, torch.from_numpy(codes_N))
        inputs_NE = torch.empty(filled_up(N), 2 * width + 1)
        inputs_NE[N:] = 0
        read_ND, product_ND, likeness_N1 = inputs_NE.split([width, width, 1], dim=1)
        histories = self._histories([request.history for request in asked])
        for span, (attention_nM, values_nD, mean_D) in zip(spans, histories, strict=True):
            candidate_ND = note_ND[span]
            if len(values_nD):
                bias_n = attention_nM[:, width].contiguous()  # which is copied to every row: three times as fast from one place
                match_Nn = torch.addmm(bias_n, candidate_ND, attention_nM[:, :width].T)
                torch.mm(torch.softmax(match_Nn, dim=1), values_nD, out=read_ND[span])
            else:
                read_ND[span] = 0
            torch.mv(candidate_ND, mean_D, out=likeness_N1[span, 0])
        torch.mul(read_ND[:N], note_ND, out=product_ND[:N])

        hidden_NW = torch.empty(len(inputs_NE), self._of_read_EW.shape[1])
        hidden_NW[N:] = 0
        of_candidates_NW = hidden_NW.numpy()[:N]
        row_N, notes = np.concatenate([request.rows for request in asked]), [request.notes for request in asked]
        self._first.fill(of_candidates_NW, notes, row_N, codes_N, self._of_users(asked, histories))
        hidden_NW.addmm_(inputs_NE, self._of_read_EW).relu_()
        hidden_KNH = hidden_NW.unflatten(1, (self._members, -1)).transpose(0, 1)
        hidden_KNH = torch.baddbmm(self._second_bias_K1H, hidden_KNH, self._second_KHH).relu_()
        logits_KTN = torch.baddbmm(self._last_bias_KT1, self._last_KTH, hidden_KNH.transpose(1, 2))
        probability_TN = logits_KTN.sigmoid_().mean(0).numpy()
        return [probability_TN[:, span] for span in spans]

    @property
    def memo(self) -> RowMemo:
        """What it keeps of the notes."""
        return self._first.memo

    def _add_of_notes(self, rows_MW: np.ndarray, code_M: np.ndarray) -> None:
        add_products(self._table_ND.index_select(0, torch.from_numpy(code_M)).numpy(), self._of_embedding_DW, rows_MW)

    def _histories(self, histories: Sequence[np.ndarray]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each request: [n, D + 1], what a note is multiplied by and what is added to give its match; [n, D], what it reads;
        the mean of that, [D]."""
        known = [np.flatnonzero(history) for history in histories]
        ends = [0, *accumulate(map(len, known))]
        spans = [slice(*ends) for ends in pairwise(ends)]
        n, width = ends[-1], self._width
        code_n, place_n = np.zeros((2, filled_up(n)), dtype=np.int64)  # filled up with the unknown note, at the first place
        code_n[:n] = np.concatenate([history[places] for history, places in zip(histories, known, strict=True)])
        place_n[:n] = np.concatenate(known)
        places_nD = self._table_ND.index_select(0, torch.from_numpy(code_n))
        places_nD += self._place_LD.index_select(0, torch.from_numpy(place_n))
        for layer in self._layers:
            places_nD = layer(places_nD, spans)
        read_nM = F.linear(F.layer_norm(places_nD, (width,)), self._read_weight, self._read_bias)
        attention_nM, values_nD = read_nM.split([width + 1, width], dim=1)
        return [(attention_nM[span], values_nD[span], values_nD[span].sum(0) / (span.stop - span.start + 1)) for span in spans]

    def _of_users(self, asked: Sequence[Asked], histories: Sequence[tuple[Tensor, Tensor, Tensor]]) -> np.ndarray:
        """[R, K * H]: the readers' half of the first layer."""
        of_user_RW = self._of_surface_SW[[request.surface for request in asked]]
        self._of_user.add_to(of_user_RW, np.stack([request.user for request in asked], dtype=np.float32))
        add_products(np.stack([request.attributes for request in asked]), self._of_attributes_AW, of_user_RW)
        history_RE = np.empty((len(asked), len(self._of_history_EW)), dtype=np.float32)
        for history_E, (_, values_nD, mean_D) in zip(history_RE, histories, strict=True):
            history_E[:-1], history_E[-1] = mean_D.numpy(), math.log1p(len(values_nD))
        add_products(history_RE, self._of_history_EW, of_user_RW)
        return of_user_RW


class _HistoryLayer:
    """`HistoryLayer` over the filled places of all histories, one after another; attention within each."""

    def __init__(self, layer: "HistoryLayer", width: int):
        first, second = (cast(torch.nn.Linear, layer.network[place]) for place in (0, 2))
        self._heads, self._width = layer.heads, width
        weight, bias = layer.query_key_value.weight.double(), layer.query_key_value.bias.double()
        scale = torch.ones(3 * width, dtype=torch.float64)
        scale[:width] = 1 / math.sqrt(width // layer.heads)
        self._in, self._in_bias = _after_norm(layer.attention_norm, weight * scale[:, None], bias * scale)
        self._out, self._out_bias = layer.out.weight.clone().T, layer.out.bias.clone()
        self._first, self._first_bias = _after_norm(layer.network_norm, first.weight.double(), first.bias.double())
        self._second, self._second_bias = second.weight.clone().T, second.bias.clone()

    def __call__(self, places_nD: Tensor, spans: Sequence[slice]) -> Tensor:
        width = self._width
        inputs_n3D = F.linear(F.layer_norm(places_nD, (width,)), self._in, self._in_bias)
        query, key, value = inputs_n3D.view(len(places_nD), 3, self._heads, width // self._heads).permute(1, 2, 0, 3)
        attended_nD = torch.zeros_like(places_nD)
        attended = attended_nD.view(len(places_nD), self._heads, width // self._heads).transpose(0, 1)
        for span in spans:
            weight = torch.softmax(query[:, span] @ key[:, span].transpose(1, 2), dim=-1)
            attended[:, span] = weight @ value[:, span]
        places_nD = torch.addmm(self._out_bias, attended_nD, self._out).add_(places_nD)
        hidden = F.gelu(F.linear(F.layer_norm(places_nD, (width,)), self._first, self._first_bias))
        return torch.addmm(self._second_bias, hidden, self._second).add_(places_nD)


def matrices(layer: "MemberLinear") -> Tensor:
    """float32 [K, in, out]: each member's own matrix."""
    return layer.take * layer.weight * layer.give


def _side_by_side(weight_KIH: Tensor) -> Tensor:
    """[I, K * H]: all members' matrices as one."""
    return weight_KIH.transpose(0, 1).flatten(1).contiguous()


def _after_norm(norm: torch.nn.LayerNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A linear layer of a norm's output as one of the values without their mean and spread; float32."""
    return (weight * norm.weight).float(), (weight @ norm.bias.double() + bias).float()
