"""What L2 makes of one request once its first layer is filled, as one ONNX graph.

One request: n places of its history that hold a known note, N candidates, D width, H hidden units of a member, W those of all
K members, T heads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models_ml.onnx_graph import Graph, Linear


class HistoryWeights(NamedTuple):
    """One layer over the history. query_key_value, first: of values less their mean, by their spread."""

    heads: int
    query_key_value: Linear
    out: Linear
    first: Linear
    second: Linear


class Weights(NamedTuple):
    """read: [D, 2 D + 1] of a place of the history, normalized: what a candidate is multiplied by, what is added to give its
    match, what it reads. of_read_EW: of what a candidate read, its product with the candidate, the candidate's likeness to the
    mean of what the history says. of_history_EW: of that mean, and of how long the history is. second, last: of each member."""

    history: Sequence[HistoryWeights]
    read: Linear
    of_read_EW: np.ndarray
    of_history_EW: np.ndarray
    second: Sequence[Linear]
    last: Sequence[Linear]


class L2Graph:
    """Safe for threads."""

    def __init__(self, weights: Weights):
        graph, width, hidden = Graph(), len(weights.read.weight_IO), weights.of_read_EW.shape[1]
        probabilities = _probabilities(graph, weights, width, hidden)
        inputs = {
            "places": ["n", width], "notes": ["N", width], "first": ["N", hidden],
            "is_there": [1], "share": [1], "log_count": [1, 1],
        }  # fmt: skip
        self._call = graph.call(inputs, {probabilities: [len(weights.last[0].bias_O), "N"]})

    def __call__(self, places_nD: np.ndarray, notes_ND: np.ndarray, first_NW: np.ndarray) -> np.ndarray:
        """float32 [T, N]: the probabilities.

        places_nD: the filled places of the history, each its note and its place. notes_ND: the candidates' embeddings.
        first_NW: the first layer, all but what hangs from the history. All float32, contiguous.
        """
        n = len(places_nD)
        is_there = n > 0
        values = {
            "places": places_nD if is_there else np.zeros((1, places_nD.shape[1]), np.float32),  # read as nothing
            "notes": notes_ND,
            "first": first_NW,
            "is_there": np.array([is_there], np.float32),
            "share": np.array([1 / (n + 1)], np.float32),
            "log_count": np.array([[np.log1p(n)]], np.float32),
        }
        return self._call(values)


def _probabilities(graph: Graph, weights: Weights, width: int, hidden: int) -> str:
    """The output's name."""
    places = "places"
    for layer in weights.history:
        places = _history_layer(graph, places, layer, width)
    factors, added, values = graph.split(graph.linear(graph.normalized(places, width), weights.read), [width, 1, width], axis=1)
    values = graph.node("Mul", values, "is_there")

    match = graph.node("Gemm", "notes", factors, graph.node("Transpose", added, perm=[1, 0]), transB=1)
    read = graph.node("MatMul", graph.node("Softmax", match, axis=1), values)
    mean = graph.node("Mul", graph.node("ReduceSum", values, graph.constant([0]), keepdims=1), "share")
    likeness = graph.node("Gemm", "notes", mean, transB=1)
    inputs = graph.node("Concat", read, graph.node("Mul", read, "notes"), likeness, axis=1)
    of_history = graph.node("MatMul", graph.node("Concat", mean, "log_count", axis=1), graph.constant(weights.of_history_EW))
    of_read = graph.node("Gemm", inputs, graph.constant(weights.of_read_EW), of_history)
    first = graph.node("Relu", graph.node("Add", of_read, "first"))

    members, of_members = len(weights.second), []
    parts = graph.split(first, [hidden // members] * members, axis=1)
    for part, second, last in zip(parts, weights.second, weights.last, strict=True):
        logits = graph.linear(graph.node("Relu", graph.linear(part, second)), last)
        of_members.append(graph.node("Sigmoid", logits))
    return graph.node("Transpose", graph.node("Mean", *of_members), perm=[1, 0], to="probabilities")


def _history_layer(graph: Graph, places: str, layer: HistoryWeights, width: int) -> str:
    """`l2_network.HistoryLayer`. A size of 0 is that of the input."""
    inputs = graph.linear(graph.normalized(places, width), layer.query_key_value)
    by_head = graph.node("Reshape", inputs, graph.constant([0, 3 * layer.heads, width // layer.heads]))
    query, key, value = graph.split(graph.node("Transpose", by_head, perm=[1, 0, 2]), [layer.heads] * 3, axis=0)
    attention = graph.node("Softmax", graph.node("MatMul", query, graph.node("Transpose", key, perm=[0, 2, 1])), axis=-1)
    read = graph.node("Transpose", graph.node("MatMul", attention, value), perm=[1, 0, 2])
    places = graph.node("Add", graph.linear(graph.node("Reshape", read, graph.constant([0, width])), layer.out), places)
    hidden = graph.node("Gelu", graph.linear(graph.normalized(places, width), layer.first))
    return graph.node("Add", graph.linear(hidden, layer.second), places)
