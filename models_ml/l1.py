"""L1: thousands of candidates down to hundreds, in about a millisecond.

A small network over the reader's features and the candidates'. Its first layer is a sum of two halves, so the reader's half
is computed once per request and added to every candidate; a candidate's score cannot depend on the other candidates.
B requests, C candidates of each (1 in training), H hidden units, T heads; U and I inputs of the reader and of a candidate.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.l1_score import l1_score
from models_ml import bundle, ranking_rows, request_rows
from models_ml.examples import Examples
from models_ml.features import FeatureInputs
from models_ml.first_layer import FirstLayer
from models_ml.onnx_graph import Call, Graph, Linear
from models_ml.request_inputs import LinearShare
from models_ml.request_rows import AnyRows, RequestTable
from models_ml.row_memo import RowMemo
from models_ml.scoring import Notes, RankingRequest, notes_of, rows_of
from models_ml.seeding import seeded
from models_ml.trainer.fit import Run, fit
from models_ml.trainer.settings import Plan

NAME = "l1"

Layers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class L1Config:
    """head_weights: what a candidate's score is made of: the weighted mean of the heads' probabilities."""

    head_weights: tuple[tuple[str, float], ...] = (("click", 1.0), ("long_view", 1.0))
    hidden: int = 32
    surface_width: int = 4
    epochs: int = 2
    batch_size: int = 1024
    learning_rate: float = 4e-3
    weight_decay: float = 0.01


class L1Network(nn.Module):
    """Raw features in (NaN for NULL), logits [B, C, T] out."""

    def __init__(self, config: L1Config, user_features: tuple[str, ...], note_features: tuple[str, ...], num_surfaces: int):
        super().__init__()
        self.user_inputs, self.note_inputs = FeatureInputs(user_features), FeatureInputs(note_features)
        self.surface = nn.Embedding(num_surfaces + 1, config.surface_width)
        self.first_user = nn.Linear(self.user_inputs.num_inputs + config.surface_width, config.hidden)
        self.first_note = nn.Linear(self.note_inputs.num_inputs, config.hidden, bias=False)
        self.second = nn.Linear(config.hidden, config.hidden)
        self.last = nn.Linear(config.hidden, len(config.head_weights))

    def forward(self, user_BU: Tensor, surface_B: Tensor, note_BCI: Tensor, reader_of_lane: Tensor | None = None) -> Tensor:
        """reader_of_lane: the request of each row of candidates, where a request has several."""
        user_half_BH = self.first_user(self.request(user_BU, surface_B))
        if reader_of_lane is not None:
            user_half_BH = user_half_BH.index_select(0, reader_of_lane)
        hidden_BCH = F.relu(self.first_note(self.note_inputs(note_BCI)) + user_half_BH[:, None, :])
        return self.last(F.relu(self.second(hidden_BCH)))

    def request(self, user_BU: Tensor, surface_B: Tensor) -> Tensor:
        """What the first layer takes of each request."""
        return torch.cat([self.user_inputs(user_BU), self.surface(surface_B)], dim=1)

    def utility(self, weights_T: Tensor, user_1U: Tensor, surface_1: Tensor, note_NI: Tensor) -> Tensor:
        """float32 [N]: one request's candidates through the fused ranker; the weighted sum of the heads' probabilities."""
        inputs_NI = self.note_inputs(note_NI)
        place_N = torch.zeros(len(inputs_NI), dtype=torch.int64, device=inputs_NI.device)
        first_note = self.first_note.weight
        return l1_score(self.request(user_1U, surface_1), inputs_NI, place_N, *self.layers(first_note), weights_T)[0]

    def layers(self, first_note: Tensor) -> Layers:
        """The weights as `l1_score` takes them, with these for the inputs of a candidate."""
        first, second, last = self.first_user, self.second, self.last
        return first.weight, first_note, first.bias, second.weight, second.bias, last.weight, last.bias


class L1Objective(nn.Module):
    """The loss of a batch of `ranking_rows.tensors_of`, summed over its candidates."""

    def __init__(self, network: L1Network):
        super().__init__()
        self.network = network

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        lane = batch.get(ranking_rows.LANE_OF)
        logits_PCT = self.network(batch["user"], batch["surface"], batch["features"], lane)
        return ranking_rows.summed_loss(logits_PCT.flatten(0, 1), batch["labels"].flatten(0, 1))


def train(
    examples: Examples,
    config: L1Config,
    seed: int,
    progress: Callable[[int, int], None],
    rows: AnyRows | None = None,
    run: Run | None = None,
) -> "L1":
    """Trains on the rows before `test_start`; the same seed gives the same weights. progress: (steps done, steps in all).

    rows: the request rows of the export, in files; without them they are made in memory.
    """
    rows = rows or RequestTable.of_examples(examples)
    user_features, note_features = examples.user_features, examples.note_features
    heads = tuple(head for head, _ in config.head_weights)
    request_rows.require_labels(rows, heads, NAME)
    facts = ranking_rows.Facts(rows, user_features, note_features, heads)
    with seeded(seed):
        network = L1Network(config, user_features, note_features, len(facts.surfaces))
        facts.fit(network.user_inputs, network.note_inputs)
        optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        source = rows.encoded(
            lambda table, ids: ranking_rows.rows_of(table, ids, user_features, note_features, facts.surfaces, heads)
        )
        plan = Plan(config.epochs, config.batch_size, config.learning_rate)
        run = replace(run or Run(), progress=progress)
        fit(L1Objective(network), source, ranking_rows.tensors_of, optimizer, plan, seed, run)
    settings = {
        "config": asdict(config),
        "user_features": user_features,
        "note_features": note_features,
        "surfaces": facts.surfaces,
        "default_surface": facts.default_surface,
    }
    return L1(network, settings)


class L1:
    """Serving side; safe for threads. What changes after construction is what it keeps of the notes, which changes no score.

    user_features, note_features: the names, in order, of what `score` takes. weights_T: of the heads, adding up to 1.
    first_layer: keeps of a note, by its number, what is tagged with that number.
    """

    def __init__(self, network: L1Network, settings: dict):
        self.network, self.settings = network.eval(), settings
        self.user_features, self.note_features = tuple(settings["user_features"]), tuple(settings["note_features"])
        self.heads = tuple(head for head, _ in settings["config"]["head_weights"])
        weights_T = torch.tensor([weight for _, weight in settings["config"]["head_weights"]])
        self.weights_T = weights_T / weights_T.sum()
        self._surface_of = {surface: row + 1 for row, surface in enumerate(settings["surfaces"])}
        self._default_surface = self._surface_of.get(settings["default_surface"] or "", 0)
        first_user, first_note = network.first_user.weight.detach(), network.first_note.weight.detach()
        of_user, of_surface = first_user.split([network.user_inputs.num_inputs, network.surface.embedding_dim], dim=1)
        self._of_surface_SH = (network.surface.weight.detach() @ of_surface.T + network.first_user.bias.detach()).numpy()
        self._of_user = LinearShare(network.user_inputs, of_user)
        self.first_layer = FirstLayer(
            network.note_inputs,
            len(first_note),
            lambda part, places_I, columns: LinearShare(part, first_note[:, places_I], columns),
        )
        self._utility = _utility(network, self.weights_T)

    def score(
        self, user: np.ndarray, notes: np.ndarray | Notes, *, surface: str | None = None, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """float32 [N] in [0, 1], higher is better; a row's score depends on nothing in the other rows.

        user: raw values [Fu] in the order of user_features; notes: [N, Fn] in the order of note_features, NaN for NULL, or what
        can give them.
        surface: where the feed is shown; None or unknown takes the one seen most in training. rows: int64 [N], a number of each
        note, small and its own, so that what notes add by themselves can be kept; -1 where it has none. Raises ValueError on
        wrong shapes.
        """
        return self.score_many([RankingRequest(user, notes, surface, rows=rows)])[0]

    def score_many(self, requests: Sequence[RankingRequest]) -> list[np.ndarray]:
        """`score` of each; the first layer is filled for all their candidates together. A request's scores are the same bit for
        bit whichever others came with it."""
        if not requests:
            return []
        notes = [notes_of(NAME, request, self.user_features, self.note_features) for request in requests]
        row_N = rows_of(requests)
        first_NH = np.empty((len(row_N), self.network.second.in_features), dtype=np.float32)
        half_RH = self._of_surface_SH[[self.code_of_surface(request.surface) for request in requests]]
        self._of_user.add_to(half_RH, np.stack([request.user for request in requests]).astype(np.float32))
        self.first_layer.fill(first_NH, notes, row_N, np.maximum(row_N, 0), half_RH)
        ends = [0, *accumulate(map(len, notes))]
        return [self._utility({"first": first_NH[start:end]}) for start, end in pairwise(ends)]

    @property
    def memo(self) -> RowMemo:
        """What it keeps of the notes."""
        return self.first_layer.memo

    def forget(self) -> None:
        """Keeps nothing of the requests so far: the next is scored as a first one is."""
        self.memo.forget()

    def code_of_surface(self, surface: str | None) -> int:
        """Its row in the embedding; None and the unknown have that of the surface seen most in training."""
        return self._surface_of.get(surface or "", self._default_surface)

    @torch.inference_mode()
    def score_rows(self, examples: Examples, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Head -> float32 [len(rows)] probabilities: the export's rows, each as a request with one candidate."""
        user_BU = torch.from_numpy(examples.columns(self.user_features)[rows].astype(np.float32))
        note_BI = torch.from_numpy(examples.columns(self.note_features)[rows].astype(np.float32))
        surface_B = torch.from_numpy(examples.codes("surface", self.settings["surfaces"])[rows])
        logits_BT = self.network(user_BU, surface_B, note_BI[:, None])[:, 0]
        probability_BT = torch.sigmoid(logits_BT.float())  # under autocast they are bf16, which numpy does not know
        return {head: probability_BT[:, column].numpy() for column, head in enumerate(self.heads)}

    def to_files(self) -> dict[str, bytes]:
        """The registry's files of this model."""
        return bundle.to_files(self.network, self.settings)


@torch.inference_mode()
def _utility(network: L1Network, weights_T: Tensor) -> Call:
    """float32 [N]: the weighted mean of the heads' probabilities, of "first", the first layer [N, H]."""
    second, last = (Linear(layer.weight.T.numpy(), layer.bias.numpy()) for layer in (network.second, network.last))
    graph = Graph()
    hidden = graph.node("Relu", graph.linear(graph.node("Relu", "first"), second))
    # One column per candidate: a product that gives but a few rows is faster than one that gives a few columns.
    logits = graph.node("Gemm", graph.constant(last.weight_IO.T), hidden, graph.constant(last.bias_O[:, None]), transB=1)
    mean = graph.node("MatMul", graph.constant(weights_T[None].numpy()), graph.node("Sigmoid", logits))
    utility = graph.node("Squeeze", mean, graph.constant([0]), to="utility")
    return graph.call({"first": ["N", len(second.weight_IO)]}, {utility: ["N"]})


def load(path: Path) -> L1:
    """path: a version's folder, as `Registry.path` gives it."""
    settings = bundle.read_settings(path)
    config = settings["config"]
    weights = tuple((head, weight) for head, weight in config["head_weights"])
    names = tuple(settings["user_features"]), tuple(settings["note_features"])
    network = L1Network(L1Config(**{**config, "head_weights": weights}), *names, len(settings["surfaces"]))
    bundle.read_weights(network, path)
    return L1(network, settings)
