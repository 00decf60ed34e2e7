"""L2 for one request on a CPU: what `L2Network` says of its candidates, in a fraction of the time.

Weights are multiplied out once, when the model is loaded: the members' matrices, the query's matrix into the key's, features
and their bins into tables (`PiecewiseTable`). Only places that hold a note are computed, so padding costs nothing.
N candidates, n places of the history that hold a known note, D width, K members, H hidden units, T heads.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models_ml.request_inputs import PiecewiseTable

if TYPE_CHECKING:
    from models_ml.l2 import HistoryLayer, L2Network, MemberLinear


class L2Scorer:
    """Read-only after construction, which copies the network's weights but those of the history layers. table_ND:
    `notes.table()`."""

    @torch.inference_mode()
    def __init__(self, network: "L2Network", table_ND: Tensor):
        self._table_ND, self._place_LD = table_ND, network.place
        self._layers = [cast("HistoryLayer", layer) for layer in network.history_layers]
        self._norm = network.history_norm
        width = self._width = network.config.width

        # query . key = note . (Wq' Wk h + Wq' bk) + bq . (Wk h + bk): one product of the history, none of the candidates
        (query, query_bias), (key, key_bias), (value, value_bias) = (
            (layer.weight.double(), layer.bias.double()) for layer in (network.query, network.key, network.value)
        )
        scale = 1 / math.sqrt(width)
        self._read_weight = torch.cat([query.T @ key * scale, (query_bias @ key * scale)[None], value]).float()
        self._read_bias = torch.cat([query.T @ key_bias * scale, (query_bias @ key_bias * scale)[None], value_bias]).float()

        num_user, num_note = network.user_inputs.num_inputs, network.note_inputs.num_inputs
        user_KIH, note_KIH = matrices(network.first_user), matrices(network.first_note)
        self._user_features = PiecewiseTable(network.user_inputs, user_KIH[:, :num_user])
        of_surface, of_attributes, of_mean, of_count = user_KIH[:, num_user:].split([8, 16, width, 1], dim=1)
        assert network.first_user.bias is not None
        bias_KH = network.first_user.bias[:, 0] + network.attributes.bias @ of_attributes
        self._of_surface_SKH = torch.einsum("se,keh->skh", network.surface.weight, of_surface) + bias_KH
        self._of_attributes_AKH = torch.einsum("ea,keh->akh", network.attributes.weight, of_attributes)
        self._of_mean_DKH = torch.cat([of_mean, of_count], dim=1).transpose(0, 1).contiguous()

        self._note_features = PiecewiseTable(network.note_inputs, note_KIH[:, :num_note])
        self._of_note = note_KIH[:, num_note:].unbind(0)  # note, what it reads, their product, likeness to the mean
        self._second = matrices(network.second).unbind(0)
        assert network.second.bias is not None
        self._second_bias = network.second.bias.unbind(0)
        self._last = network.last_KHT.transpose(1, 2).contiguous().unbind(0)
        self._last_bias = network.last_bias_KT.transpose(1, 2).contiguous().unbind(0)

    @torch.inference_mode()
    def __call__(
        self,
        user: np.ndarray,
        surface: int,
        attributes: np.ndarray,
        history: Sequence[int],
        codes: np.ndarray,
        notes: np.ndarray,
    ) -> np.ndarray:
        """float32 [T, N] probabilities. user [Fu], notes [N, Fn]: raw features, NaN for NULL. attributes: 0 and 1.

        history: codes, newest first, at most as many as there are places; codes: int64 [N]. Code 0 is an unknown note.
        """
        attention_nM, values_nD = self._history(history)
        mean_D = values_nD.sum(0) / (len(values_nD) + 1)
        user_KH = self._user(user, surface, attributes, mean_D, len(values_nD))

        note_ND = self._table_ND.index_select(0, torch.from_numpy(codes))
        width, N = self._width, len(codes)
        inputs_NI = torch.empty(N, 3 * width + 1)
        inputs_NI[:, :width] = note_ND
        read_ND = inputs_NI[:, width : 2 * width]
        if len(values_nD):
            match_Nn = torch.addmm(attention_nM[:, width], note_ND, attention_nM[:, :width].T)
            torch.mm(torch.softmax(match_Nn, dim=1), values_nD, out=read_ND)
        else:
            read_ND.zero_()
        torch.mul(read_ND, note_ND, out=inputs_NI[:, 2 * width : -1])
        torch.mv(note_ND, mean_D, out=inputs_NI[:, -1])

        probability_TN = None
        for member, hidden_NH in enumerate(self._note_features(notes)):
            hidden_NH.addmm_(inputs_NI, self._of_note[member]).add_(user_KH[member]).relu_()
            hidden_NH = torch.addmm(self._second_bias[member], hidden_NH, self._second[member]).relu_()
            logits_TN = torch.addmm(self._last_bias[member], self._last[member], hidden_NH.T)
            probability_TN = logits_TN.sigmoid_() if probability_TN is None else probability_TN.add_(logits_TN.sigmoid_())
        assert probability_TN is not None
        return probability_TN.div_(len(self._second)).numpy()

    def _history(self, history: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[n, D + 1], what a note is multiplied by and what is added to give its match; [n, D], what it reads."""
        filled = [(place, code) for place, code in enumerate(history) if code]
        place_n, code_n = torch.tensor(filled, dtype=torch.int64).view(-1, 2).unbind(1)
        places_nD = self._table_ND.index_select(0, code_n).add_(self._place_LD.index_select(0, place_n))
        if filled and self._layers:
            num_there_1 = torch.tensor([len(filled)])
            for layer in self._layers:
                places_nD = layer.infer(places_nD[None], num_there_1)[0]
        places_nD = self._norm(places_nD)
        return F.linear(places_nD, self._read_weight, self._read_bias).split([self._width + 1, self._width], dim=1)

    def _user(self, user: np.ndarray, surface: int, attributes: np.ndarray, mean_D: Tensor, num_there: int) -> Tensor:
        """[K, H]: the reader's half of the first layer."""
        user_KH = torch.cat(self._user_features(user[None]))
        user_KH += self._of_surface_SKH[surface]
        known = attributes.nonzero()[0]
        if len(known):
            user_KH += self._of_attributes_AKH[torch.from_numpy(known)].sum(0)
        sums = torch.cat([mean_D, mean_D.new_tensor([math.log1p(num_there)])])
        user_KH += (sums @ self._of_mean_DKH.flatten(1)).view_as(user_KH)
        return user_KH


def matrices(layer: "MemberLinear") -> Tensor:
    """float32 [K, in, out]: each member's own matrix."""
    return layer.take * layer.weight * layer.give
