"""L2 for requests on a CPU: what `L2Network` says of their candidates, in a fraction of the time.

Weights are multiplied out once, when the model is loaded: the members' matrices, the query's matrix into the key's, norms into
the layers after them, features and their bins into tables (`PiecewiseTable`). What a note adds by itself is kept from request
to request (`RowMemo`). Only places that hold a note are computed, so padding costs nothing.

Several requests may come in one call: the first layer is filled for all their rows together, each row from itself alone; the
rest is one graph (`l2_graph.py`), run for each request by itself. So a request's scores are the same bit for bit whichever
others came with it.
R requests, N candidates of all, n places of a history that hold a known note, D width, K members, H hidden units, T heads.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from models_ml.first_layer import FirstLayer
from models_ml.l2_graph import HistoryWeights, L2Graph, Weights
from models_ml.l2_network import HistoryLayer, L2Network, MemberLinear
from models_ml.onnx_graph import Linear
from models_ml.request_inputs import PiecewiseTable, add_products
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
        self._table_ND, self._place_LD = table_ND.numpy(), network.place.numpy().copy()
        width = network.config.width

        # query . key = note . (Wq' Wk h + Wq' bk) + bq . (Wk h + bk): one product of the history, none of the candidates
        (query, query_bias), (key, key_bias), (value, value_bias) = (
            (layer.weight.double(), layer.bias.double()) for layer in (network.query, network.key, network.value)
        )
        scale = 1 / math.sqrt(width)
        weight = torch.cat([query.T @ key * scale, (query_bias @ key * scale)[None], value])
        bias = torch.cat([query.T @ key_bias * scale, (query_bias @ key_bias * scale)[None], value_bias])

        num_user, num_note = network.user_inputs.num_inputs, network.note_inputs.num_inputs
        user_KIH, note_KIH = matrices(network.first_user), matrices(network.first_note)
        members, _, hidden = note_KIH.shape
        self._width = members * hidden
        of_surface, of_attributes, of_mean, of_count = user_KIH[:, num_user:].split([8, 16, width, 1], dim=1)
        assert network.first_user.bias is not None
        bias_KH = network.first_user.bias[:, 0] + network.attributes.bias @ of_attributes
        self._of_surface_SW = (torch.einsum("se,keh->skh", network.surface.weight, of_surface) + bias_KH).flatten(1).numpy()
        self._of_attributes_AW = torch.einsum("ea,keh->akh", network.attributes.weight, of_attributes).flatten(1).numpy()
        self._of_user = PiecewiseTable(network.user_inputs, user_KIH[:, :num_user])

        of_features, of_embedding, of_read, of_likeness = note_KIH.split([num_note, width, 2 * width, 1], dim=1)
        self._of_embedding_DW = _side_by_side(of_embedding).numpy()
        self.first_layer = FirstLayer(
            network.note_inputs,
            self._width,
            lambda part, places_I, columns: PiecewiseTable(part, of_features[:, places_I], columns),
            self._add_of_notes,
        )

        second, last = network.second, network.last_KHT
        assert second.bias is not None
        self._graph = L2Graph(
            Weights(
                history=[_history_weights(cast("HistoryLayer", layer), width) for layer in network.history_layers],
                read=_after_norm(network.history_norm, weight, bias),
                of_read_EW=_side_by_side(torch.cat([of_read, of_likeness], dim=1)).numpy(),
                of_history_EW=_side_by_side(torch.cat([of_mean, of_count], dim=1)).numpy(),
                second=[Linear(*each) for each in zip(matrices(second).numpy(), second.bias[:, 0].numpy(), strict=True)],
                last=[Linear(*each) for each in zip(last.numpy(), network.last_bias_KT[:, 0].numpy(), strict=True)],
            )
        )

    def __call__(self, asked: Sequence[Asked]) -> list[np.ndarray]:
        """float32 [T, its candidates] probabilities of each request."""
        ends = [0, *accumulate(len(request.codes) for request in asked)]
        codes_N, row_N = (np.concatenate(parts) for parts in zip(*((one.codes, one.rows) for one in asked), strict=True))
        first_NW = np.empty((ends[-1], self._width), dtype=np.float32)
        self.first_layer.fill(first_NW, [request.notes for request in asked], row_N, codes_N, self._of_users(asked))
        return [self._scores(request, first_NW[start:end]) for request, (start, end) in zip(asked, pairwise(ends), strict=True)]

    def _scores(self, request: Asked, first_NW: np.ndarray) -> np.ndarray:
        known = np.flatnonzero(request.history)
        places_nD = self._table_ND.take(request.history[known], axis=0)
        places_nD += self._place_LD.take(known, axis=0)
        return self._graph(places_nD, self._table_ND.take(request.codes, axis=0), first_NW)

    def _add_of_notes(self, rows_MW: np.ndarray, code_M: np.ndarray) -> None:
        add_products(self._table_ND.take(code_M, axis=0), self._of_embedding_DW, rows_MW)

    def _of_users(self, asked: Sequence[Asked]) -> np.ndarray:
        """[R, K * H]: the readers' part of the first layer, but for what their histories add."""
        of_user_RW = self._of_surface_SW[[request.surface for request in asked]]
        self._of_user.add_to(of_user_RW, np.stack([request.user for request in asked], dtype=np.float32))
        add_products(np.stack([request.attributes for request in asked]), self._of_attributes_AW, of_user_RW)
        return of_user_RW


def _history_weights(layer: "HistoryLayer", width: int) -> HistoryWeights:
    """`layer` with its norms, and the root that scores are divided by, in the layers after and before them."""
    first, second = (cast(torch.nn.Linear, layer.network[place]) for place in (0, 2))
    weight, bias = layer.query_key_value.weight.double(), layer.query_key_value.bias.double()
    scale = torch.ones(3 * width, dtype=torch.float64)
    scale[:width] = 1 / math.sqrt(width // layer.heads)
    return HistoryWeights(
        layer.heads,
        _after_norm(layer.attention_norm, weight * scale[:, None], bias * scale),
        _as_it_is(layer.out),
        _after_norm(layer.network_norm, first.weight.double(), first.bias.double()),
        _as_it_is(second),
    )


def matrices(layer: "MemberLinear") -> Tensor:
    """float32 [K, in, out]: each member's own matrix."""
    return layer.take * layer.weight * layer.give


def _side_by_side(weight_KIH: Tensor) -> Tensor:
    """[I, K * H]: all members' matrices as one."""
    return weight_KIH.transpose(0, 1).flatten(1).contiguous()


def _as_it_is(layer: torch.nn.Linear) -> Linear:
    return Linear(layer.weight.T.numpy(), layer.bias.numpy())


def _after_norm(norm: torch.nn.LayerNorm, weight: Tensor, bias: Tensor) -> Linear:
    """A linear layer of a norm's output as one of the values without their mean and spread."""
    return Linear((weight * norm.weight).float().T.numpy(), (weight @ norm.bias.double() + bias).float().numpy())
