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
import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models_ml.l2_network import HistoryLayer, L2Network, MemberLinear
from models_ml.request_inputs import READERS, FewRows, PiecewiseTable, filled_up, part_of
from models_ml.row_memo import RowMemo

BLOCK = 64
_OF_READER = re.compile(r"^user_")
_OF_REQUEST = re.compile(r"_age_min$")


class Asked(NamedTuple):
    """One request. user [Fu], notes [N, Fn]: raw features, NaN for NULL. attributes: 0 and 1. history: int64
    codes, newest first, at most as many as there are places; codes: int64 [N]. Code 0 is an unknown note."""

    user: np.ndarray
    surface: int
    attributes: np.ndarray
    history: np.ndarray
    codes: np.ndarray
    notes: np.ndarray


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
        members, _, hidden = note_KIH.shape
        self._members = members
        self._user_inputs = FewRows(network.user_inputs)
        of_surface, of_attributes, of_mean, of_count = user_KIH[:, num_user:].split([8, 16, width, 1], dim=1)
        assert network.first_user.bias is not None
        bias_KH = network.first_user.bias[:, 0] + network.attributes.bias @ of_attributes
        self._of_surface_SW = (torch.einsum("se,keh->skh", network.surface.weight, of_surface) + bias_KH).flatten(1)
        self._of_attributes_AW = torch.einsum("ea,keh->akh", network.attributes.weight, of_attributes).flatten(1)
        # features, the mean of what the history says, how long it is
        self._of_reader_IW = _side_by_side(torch.cat([user_KIH[:, :num_user], of_mean, of_count], dim=1))

        columns = _columns_by_owner(network.note_inputs.names)
        self._reader_columns, self._request_columns, self._note_columns = columns
        width_W = members * hidden
        (_, reader_I), (request_inputs, request_I), (_, note_I) = (part_of(network.note_inputs, some) for some in columns)
        of_features, of_embedding, of_rest = note_KIH.split([num_note, width, 2 * width + 1], dim=1)
        self._of_notes_features = PiecewiseTable(part_of(network.note_inputs, self._note_columns)[0], of_features[:, note_I])
        self._of_embedding_DW = _side_by_side(of_embedding)
        self._of_notes = RowMemo(1 + len(self._note_columns), width_W, self._made_of_notes)
        of_reader = PiecewiseTable(part_of(network.note_inputs, self._reader_columns)[0], of_features[:, reader_I])
        self._of_reader = RowMemo(len(self._reader_columns), width_W, lambda values_NF: torch.cat(of_reader(values_NF), dim=1))
        # what a note reads, its product with the note, likeness to the mean, features of the request
        self._request_inputs = FewRows(request_inputs)
        self._of_rest_IW = _side_by_side(torch.cat([of_rest, of_features[:, request_I]], dim=1))

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
        filled = filled_up(N)
        codes_N = np.concatenate([request.codes for request in asked])
        notes_NF = np.concatenate([request.notes for request in asked], dtype=np.float32)

        note_ND = self._table_ND.index_select(0, torch.from_numpy(codes_N))
        inputs_NI = torch.empty(filled, len(self._of_rest_IW))
        inputs_NI[N:] = 0
        read_ND, product_ND, likeness_N1, request_NI = inputs_NI.split(
            [width, width, 1, self._request_inputs.num_inputs], dim=1
        )
        histories = self._histories([request.history for request in asked])
        for span, (attention_nM, values_nD, mean_D) in zip(spans, histories, strict=True):
            candidate_ND = note_ND[span]
            if len(values_nD):
                match_Nn = torch.addmm(attention_nM[:, width], candidate_ND, attention_nM[:, :width].T)
                torch.mm(torch.softmax(match_Nn, dim=1), values_nD, out=read_ND[span])
            else:
                read_ND[span] = 0
            torch.mv(candidate_ND, mean_D, out=likeness_N1[span, 0])
        torch.mul(read_ND[:N], note_ND, out=product_ND[:N])
        if self._request_columns:
            request_NI[:N] = torch.from_numpy(self._request_inputs(notes_NF[:, self._request_columns]))

        hidden_NW = torch.empty(filled, self._of_rest_IW.shape[1])
        hidden_NW[N:] = 0
        known_NF = np.empty((N, 1 + len(self._note_columns)), dtype=np.float32)
        known_NF[:, 0].view(np.int32)[:] = codes_N
        known_NF[:, 1:] = notes_NF[:, self._note_columns]
        self._of_notes.fill(hidden_NW[:N], known_NF)
        if self._reader_columns:
            of_reader_NW = torch.empty(N, hidden_NW.shape[1])
            self._of_reader.fill(of_reader_NW, np.ascontiguousarray(notes_NF[:, self._reader_columns]))
            hidden_NW[:N] += of_reader_NW
        user_RW = self._users(asked, [mean_D for _, _, mean_D in histories], [len(values) for _, values, _ in histories])
        for span, user_W in zip(spans, user_RW, strict=False):
            hidden_NW[span] += user_W
        hidden_NW.addmm_(inputs_NI, self._of_rest_IW).relu_()
        hidden_KNH = hidden_NW.unflatten(1, (self._members, -1)).transpose(0, 1)
        hidden_KNH = torch.baddbmm(self._second_bias_K1H, hidden_KNH, self._second_KHH).relu_()
        logits_KTN = torch.baddbmm(self._last_bias_KT1, self._last_KTH, hidden_KNH.transpose(1, 2))
        probability_TN = logits_KTN.sigmoid_().mean(0).numpy()
        return [probability_TN[:, span] for span in spans]

    def forget(self) -> None:
        """Keeps nothing of the requests so far."""
        self._of_notes.forget()
        self._of_reader.forget()

    def _made_of_notes(self, known_NF: np.ndarray) -> Tensor:
        """[N, K * H]: what notes add by themselves. Their codes, as bits, stand before their features."""
        codes_N = torch.from_numpy(known_NF[:, 0].view(np.int32))
        # one shape of product whatever the number of rows, so that a row's bits are its own
        rows_NW = torch.zeros(filled_up(len(codes_N), BLOCK), self._of_embedding_DW.shape[1])
        torch.cat(self._of_notes_features(known_NF[:, 1:]), dim=1, out=rows_NW[: len(codes_N)])
        notes_ND = torch.zeros(len(rows_NW), self._width)
        torch.index_select(self._table_ND, 0, codes_N, out=notes_ND[: len(codes_N)])
        for rows_BW, notes_BD in zip(rows_NW.split(BLOCK), notes_ND.split(BLOCK), strict=True):
            rows_BW.addmm_(notes_BD, self._of_embedding_DW)
        return rows_NW[: len(codes_N)]

    def _histories(self, histories: Sequence[np.ndarray]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each request: [n, D + 1], what a note is multiplied by and what is added to give its match; [n, D], what it reads;
        the mean of that, [D]."""
        known = [np.flatnonzero(history) for history in histories]
        ends = [0, *accumulate(map(len, known))]
        spans = [slice(*ends) for ends in pairwise(ends)]
        n, width = ends[-1], self._width
        code_n = np.concatenate([history[places] for history, places in zip(histories, known, strict=True)])
        places_nD = torch.zeros(filled_up(n), width)
        torch.index_select(self._table_ND, 0, torch.from_numpy(code_n), out=places_nD[:n])
        places_nD[:n] += self._place_LD.index_select(0, torch.from_numpy(np.concatenate(known)))
        for layer in self._layers:
            places_nD = layer(places_nD, spans)
        read_nM = F.linear(F.layer_norm(places_nD, (width,)), self._read_weight, self._read_bias)
        attention_nM, values_nD = read_nM.split([width + 1, width], dim=1)
        return [(attention_nM[span], values_nD[span], values_nD[span].sum(0) / (span.stop - span.start + 1)) for span in spans]

    def _users(self, asked: Sequence[Asked], means: list[Tensor], num_there: list[int]) -> Tensor:
        """[at least R, K * H]: the readers' half of the first layer."""
        num_features, R = self._user_inputs.num_inputs, len(asked)
        inputs_RI = torch.zeros(filled_up(R, READERS), len(self._of_reader_IW))
        features_RI = self._user_inputs(np.stack([request.user for request in asked]))
        inputs_RI[:R, :num_features] = torch.from_numpy(features_RI)
        inputs_RI[:R, num_features:-1] = torch.stack(means)
        inputs_RI[:R, -1] = torch.tensor([math.log1p(num) for num in num_there])
        user_RW = inputs_RI @ self._of_reader_IW
        for request, user_W in zip(asked, user_RW, strict=False):
            user_W += self._of_surface_SW[request.surface]
            known = request.attributes.nonzero()[0]
            if len(known):
                user_W += self._of_attributes_AW.index_select(0, torch.from_numpy(known)).sum(0)
        return user_RW


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


def _columns_by_owner(names: Sequence[str]) -> tuple[list[int], list[int], list[int]]:
    """Of a candidate's features: those of the reader with it, those of the moment, and the rest, of notes and authors."""
    of_reader = [column for column, name in enumerate(names) if _OF_READER.search(name)]
    of_request = [column for column, name in enumerate(names) if _OF_REQUEST.search(name) and column not in of_reader]
    return of_reader, of_request, sorted(set(range(len(names))) - set(of_reader) - set(of_request))


def matrices(layer: "MemberLinear") -> Tensor:
    """float32 [K, in, out]: each member's own matrix."""
    return layer.take * layer.weight * layer.give


def _side_by_side(weight_KIH: Tensor) -> Tensor:
    """[I, K * H]: all members' matrices as one."""
    return weight_KIH.transpose(0, 1).flatten(1).contiguous()


def _after_norm(norm: torch.nn.LayerNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A linear layer of a norm's output as one of the values without their mean and spread; float32."""
    return (weight * norm.weight).float(), (weight @ norm.bias.double() + bias).float()
