"""L2: the final ranker. A short transformer over the reader's history, target attention from each candidate, and an ensemble of
small networks over everything else; one probability per head.

Late fusion: what depends on the reader alone (the encoded history, the reader's half of the first layer) is computed once per
request; each candidate then reads it by itself, so a candidate's score cannot depend on the other candidates.
B requests, C candidates of each (1 in training), L places of a history (newest first, code 0 = padding), D width, K members,
H hidden units, T heads (tasks), U and I inputs of the reader and of a candidate.
Sources: SASRec (Kang and McAuley, ICDM 2018), target attention (Zhou et al., KDD 2018), candidate isolation and late fusion
as in X's open algorithm, shared-weight ensembles (TabM, Gorishniy et al., ICLR 2025).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.sequence_block import BlockWeights, sequence_block
from models_ml import bundle, ranking_rows, request_rows
from models_ml.attributes import AttributeInputs
from models_ml.examples import Examples
from models_ml.features import FeatureInputs
from models_ml.l2_scorer import Asked, L2Scorer
from models_ml.notes import NoteTower, NoteWords
from models_ml.request_rows import AnyRows, Encode, RequestTable
from models_ml.scoring import RankingRequest, check_shapes
from models_ml.seeding import seeded
from models_ml.trainer.fit import Run, fit
from models_ml.trainer.rows import Rows
from models_ml.trainer.settings import Plan
from warehouse.errors import HeadraceError

NAME = "l2"


@dataclass(frozen=True)
class L2Config:
    """One more head is one more label name in `heads`. layers: self-attention over the history; 0 reads the notes as they
    are. rehearsal_days: held back to calibrate on (`calibration`), for a second training; 0 leaves the heads as they are."""

    heads: tuple[str, ...] = ("click", "long_view")
    history_length: int = 50
    width: int = 24
    layers: int = 1
    attention_heads: int = 2
    hidden: int = 96
    members: int = 4
    bins: int = 8
    epochs: int = 2
    batch_size: int = 1024
    learning_rate: float = 2e-3
    warm_up: float = 0.1
    weight_decay: float = 0.01
    id_weight_decay: float = 1.0
    dropout: float = 0.1
    id_dropout: float = 0.2
    attribute_dropout: float = 0.1
    rehearsal_days: float = 0.0


class Shape(NamedTuple):
    """All that, beside the config, decides the network's tensors; saved with the model."""

    words: NoteWords
    user_features: tuple[str, ...]
    note_features: tuple[str, ...]
    surfaces: tuple[str, ...]
    attributes: tuple[str, ...]


class Reader(NamedTuple):
    """What depends on the request alone: keys and values of the history [B, L, D], which places are filled [B, L], the mean
    of the values [B, D], and the reader's half of the first layer [K, B, H]."""

    keys_BLD: Tensor
    values_BLD: Tensor
    is_there_BL: Tensor
    mean_BD: Tensor
    first_KBH: Tensor

    def of_lanes(self, reader_of_lane: Tensor) -> "Reader":
        """The same for each lane of candidates: int64 [P], a request's number."""
        keys, values, is_there, mean = (part.index_select(0, reader_of_lane) for part in self[:4])
        return Reader(keys, values, is_there, mean, self.first_KBH.index_select(1, reader_of_lane))


class MemberLinear(nn.Module):
    """K linear layers that share one matrix and differ in what they take in, give out and add.

    [R, in], the same for all members, or [K, R, in] -> [K, R, out].
    """

    def __init__(self, members: int, size_in: int, size_out: int, signs: bool, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_in, size_out).uniform_(-1, 1) / math.sqrt(size_in))
        start = torch.randint(0, 2, (members, size_in, 1)).float() * 2 - 1 if signs else torch.ones(members, size_in, 1)
        self.take = nn.Parameter(start)
        self.give = nn.Parameter(torch.ones(members, 1, size_out))
        self.bias = nn.Parameter(torch.zeros(members, 1, size_out)) if bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        # the members' matrices are far smaller than the members' inputs would be
        weight_KIO = self.take * self.weight * self.give
        if inputs.dim() == 3:
            outputs_KRO = torch.bmm(inputs, weight_KIO)
        else:
            members, size_in, size_out = weight_KIO.shape
            side_by_side = inputs @ weight_KIO.transpose(0, 1).reshape(size_in, members * size_out)
            outputs_KRO = side_by_side.unflatten(1, (members, size_out)).transpose(0, 1)
        return outputs_KRO if self.bias is None else outputs_KRO + self.bias


class HistoryLayer(nn.Module):
    """Pre-norm self-attention and a two-layer network over the places of a history, each with a residual."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, places_BLD: Tensor, bias_BL: Tensor) -> Tensor:
        size_B, length, width = places_BLD.shape
        split = self.query_key_value(self.attention_norm(places_BLD)).view(size_B, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=bias_BL[:, None, None, :])
        places_BLD = places_BLD + self.out(read.transpose(1, 2).reshape(size_B, length, width))
        return places_BLD + self.network(self.network_norm(places_BLD))

    def infer(self, places_BLD: Tensor, num_there_B: Tensor) -> Tensor:
        """The same in one operation, for inference. The first `num_there_B` places are the filled ones; zeros come after."""
        first, second = self.network[0], self.network[2]
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        weights = BlockWeights(
            self.query_key_value.weight, self.query_key_value.bias, self.out.weight, self.out.bias,
            self.attention_norm.weight, self.attention_norm.bias, first.weight, first.bias, second.weight, second.bias,
            self.network_norm.weight, self.network_norm.bias,
        )  # fmt: skip
        inputs_BLD = places_BLD.to(first.weight.dtype)
        out = sequence_block(inputs_BLD, num_there_B, weights, self.heads, norm_first=True, activation="gelu")
        return out.to(places_BLD.dtype)


class L2Network(nn.Module):
    """`read` a request once, then `logits` of its candidates."""

    def __init__(self, config: L2Config, shape: Shape):
        super().__init__()
        self.config = config
        self.fused = True  # outside training, read the history by one fused operation
        width, members, hidden = config.width, config.members, config.hidden
        self.user_inputs = FeatureInputs(shape.user_features, config.bins)
        self.note_inputs = FeatureInputs(shape.note_features, config.bins)
        self.notes = NoteTower(shape.words, width, config.id_dropout)
        self.surface = nn.Embedding(len(shape.surfaces) + 1, 8)
        self.attributes = nn.Linear(len(shape.attributes), 16)
        self.place = nn.Parameter(torch.randn(config.history_length, width) * 0.02)
        self.history_layers = nn.ModuleList(HistoryLayer(width, config.attention_heads) for _ in range(config.layers))
        self.history_norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        user_size = self.user_inputs.num_inputs + 8 + 16 + width + 1
        note_size = self.note_inputs.num_inputs + 3 * width + 1
        self.first_user = MemberLinear(members, user_size, hidden, signs=True)
        self.first_note = MemberLinear(members, note_size, hidden, signs=True, bias=False)
        self.second = MemberLinear(members, hidden, hidden, signs=False)
        self.last_KHT = nn.Parameter(torch.randn(members, hidden, len(config.heads)) / math.sqrt(hidden))
        self.last_bias_KT = nn.Parameter(torch.zeros(members, 1, len(config.heads)))

    def read(self, user_BU: Tensor, surface_B: Tensor, attributes_BA: Tensor, history_BL: Tensor, table_ND: Tensor) -> Reader:
        """user_BU: raw features. table_ND: `notes.table()`."""
        return self.read_places(user_BU, surface_B, attributes_BA, history_BL > 0, F.embedding(history_BL, table_ND))

    def read_places(
        self, user_BU: Tensor, surface_B: Tensor, attributes_BA: Tensor, is_there_BL: Tensor, note_BLD: Tensor
    ) -> Reader:
        """`read` of a history whose notes have been looked up. Outside training the filled places come first in the answer."""
        places_BLD = note_BLD + self.place
        if self.training or not self.fused:
            bias_BL = torch.zeros_like(is_there_BL, dtype=torch.float32).masked_fill(~is_there_BL, -1e9)
            for layer in self.history_layers:
                places_BLD = layer(places_BLD, bias_BL)
        else:
            # A place is known by its embedding, not by where it stands, so the filled ones may close ranks.
            order_BL = (~is_there_BL).to(torch.uint8).argsort(dim=1, stable=True)
            is_there_BL = is_there_BL.gather(1, order_BL)
            places_BLD = places_BLD.gather(1, order_BL[:, :, None].expand_as(places_BLD))
            num_there_B = is_there_BL.sum(1)
            for layer in self.history_layers:
                assert isinstance(layer, HistoryLayer)
                places_BLD = layer.infer(places_BLD, num_there_B)
        places_BLD = self.history_norm(places_BLD)
        values_BLD = self.value(places_BLD)
        filled_BL1 = is_there_BL.unsqueeze(-1)
        num_there_B1 = is_there_BL.sum(1, keepdim=True)
        mean_BD = (values_BLD * filled_BL1).sum(1) / (num_there_B1 + 1)
        attributes_BA = F.dropout(attributes_BA, self.config.attribute_dropout, self.training)
        inputs_BU = torch.cat(
            [
                self.user_inputs(user_BU),
                self.surface(surface_B),
                self.attributes(attributes_BA),
                mean_BD,
                torch.log1p(num_there_B1.float()),
            ],
            dim=1,
        )
        return Reader(self.key(places_BLD), values_BLD, is_there_BL, mean_BD, self.first_user(inputs_BU))

    def logits(self, reader: Reader, note_BC: Tensor, note_BCI: Tensor, table_ND: Tensor) -> Tensor:
        """float32 [K, B, C, T]. note_BC: codes; note_BCI: raw features."""
        return self.logits_of(reader, F.embedding(note_BC, table_ND), note_BCI)

    def logits_of(self, reader: Reader, note_BCD: Tensor, note_BCI: Tensor) -> Tensor:
        """`logits` of notes that have been looked up."""
        size_B, size_C = note_BCD.shape[:2]
        match_BCL = self.query(note_BCD) @ reader.keys_BLD.transpose(1, 2) / math.sqrt(self.config.width)
        match_BCL = match_BCL.masked_fill(~reader.is_there_BL[:, None, :], -1e9)
        attention_BCL = torch.softmax(match_BCL, dim=-1) * reader.is_there_BL[:, None, :]
        read_BCD = attention_BCL @ reader.values_BLD
        alike_BC1 = (note_BCD * reader.mean_BD[:, None, :]).sum(-1, keepdim=True)
        note_part = F.dropout(note_BCD, self.config.id_dropout, self.training)
        inputs_BCI = torch.cat([self.note_inputs(note_BCI), note_part, read_BCD, read_BCD * note_BCD, alike_BC1], dim=-1)
        note_half = self.first_note(inputs_BCI.flatten(0, 1)).unflatten(1, (size_B, size_C))
        hidden = F.relu(note_half + reader.first_KBH.unsqueeze(2)).flatten(1, 2)
        hidden = F.dropout(hidden, self.config.dropout, self.training)
        hidden = F.dropout(F.relu(self.second(hidden)), self.config.dropout, self.training)
        logits = torch.bmm(hidden, self.last_KHT) + self.last_bias_KT
        return logits.unflatten(1, (size_B, size_C))


class Inputs(NamedTuple):
    """Training or evaluation rows as tensors, in the order of `L2Network.read` and `.logits`."""

    user_RU: Tensor
    surface_R: Tensor
    attributes_SA: Tensor
    attributes_of_R: Tensor
    history_RL: Tensor
    note_R: Tensor
    note_RI: Tensor


def inputs_of(examples: Examples, shape: Shape, history_length: int) -> Inputs:
    """All rows of the export, as this model reads them. Readers share attributes: S distinct texts, a place among them per
    row."""
    texts, text_of_R = np.unique([text or "" for text in examples.user_attributes()], return_inverse=True)
    return Inputs(
        torch.from_numpy(examples.columns(shape.user_features).astype(np.float32)),
        torch.from_numpy(examples.codes("surface", shape.surfaces)),
        torch.from_numpy(AttributeInputs(shape.attributes).encode([str(text) for text in texts])),
        torch.from_numpy(text_of_R),
        torch.from_numpy(examples.histories(shape.words.note_ids, history_length)),
        torch.from_numpy(examples.codes("note_id", shape.words.note_ids)),
        torch.from_numpy(examples.columns(shape.note_features).astype(np.float32)),
    )


def _logits_of_rows(network: L2Network, inputs: Inputs, rows: Tensor, table_ND: Tensor) -> Tensor:
    """float32 [K, B, T]: each row is a request with one candidate."""
    attributes_BA = inputs.attributes_SA[inputs.attributes_of_R[rows]]
    reader = network.read(inputs.user_RU[rows], inputs.surface_R[rows], attributes_BA, inputs.history_RL[rows], table_ND)
    return network.logits(reader, inputs.note_R[rows, None], inputs.note_RI[rows, None], table_ND).squeeze(2)


class L2Objective(nn.Module):
    """The loss of a batch of `tensors_of`, mean over the members, summed over its candidates."""

    def __init__(self, network: L2Network):
        super().__init__()
        self.network = network

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        table_ND = self.network.notes.table()
        reader = self.network.read(batch["user"], batch["surface"], batch["attributes"], batch["history"], table_ND)
        if ranking_rows.LANE_OF in batch:
            reader = reader.of_lanes(batch[ranking_rows.LANE_OF])
        logits_KPCT = self.network.logits(reader, batch["note"], batch["features"], table_ND)
        labels_KPCT = batch["labels"].expand_as(logits_KPCT)
        loss = ranking_rows.summed_loss(logits_KPCT.flatten(0, 2), labels_KPCT.flatten(0, 2))
        return loss / len(logits_KPCT)


def encoder_of(shape: Shape, config: L2Config) -> Encode:
    """Request rows as this model reads them: those of `ranking_rows.rows_of`, and history int32 [R, L], attributes as bits
    [R, A / 8], note [N]."""
    note_ids, inputs = pa.array(shape.words.note_ids, pa.string()), AttributeInputs(shape.attributes)
    bits_of: dict[str | None, np.ndarray] = {}

    def encode(table: pa.Table, row_ids: np.ndarray) -> Rows:
        rows = ranking_rows.rows_of(table, row_ids, shape.user_features, shape.note_features, shape.surfaces, config.heads)
        texts = table["user_attributes"].to_pylist()
        for text in set(texts) - bits_of.keys():
            bits_of[text] = np.packbits(inputs.encode([text])[0] > 0)
        per_row = {
            **rows.per_row,
            "history": request_rows.newest_first(table[request_rows.HISTORY], note_ids, config.history_length),
            "attributes": np.stack([bits_of[text] for text in texts]),
        }
        return replace(
            rows,
            per_row=per_row,
            per_candidate={**rows.per_candidate, "note": request_rows.codes(table["note_id"], note_ids)},
        )

    return encode


def tensors_of(rows: Rows, num_attributes: int) -> dict[str, Tensor]:
    """`ranking_rows.tensors_of` with attributes as float32 [R, A]."""
    batch = ranking_rows.tensors_of(rows)
    bits_RA = np.unpackbits(batch["attributes"].numpy(), axis=1, count=num_attributes)
    return {**batch, "attributes": torch.from_numpy(bits_RA.astype(np.float32))}


def train(
    examples: Examples,
    config: L2Config,
    seed: int,
    progress: Callable[[int, int], None],
    rows: AnyRows | None = None,
    run: Run | None = None,
) -> "L2":
    """Trains on the rows before `test_start`; the same seed gives the same weights. progress: (steps done, steps in all).

    rows: the request rows of the export, in files; without them they are made in memory.
    """
    rows = rows or RequestTable.of_examples(examples)
    request_rows.require_labels(rows, config.heads, NAME)
    if config.history_length > request_rows.HISTORY_PLACES:
        most = request_rows.HISTORY_PLACES
        raise HeadraceError(f"l2: history_length must be at most {most}, what request rows hold; got {config.history_length}")
    attributes = AttributeInputs.of(examples.users["attributes"].to_pylist()).words
    facts = ranking_rows.Facts(rows, examples.user_features, examples.note_features, config.heads)
    shape = Shape(
        NoteWords.of(examples), examples.user_features, examples.note_features, tuple(facts.surfaces), tuple(attributes)
    )
    with seeded(seed):
        network = L2Network(config, shape)
        network.notes.describe(examples.notes, shape.words)
        facts.fit(network.user_inputs, network.note_inputs)
        ranking_rows.set_bias(network.last_bias_KT, facts.base_rate_T)
        plan = Plan(config.epochs, config.batch_size, config.learning_rate, config.warm_up)
        run = replace(run or Run(), progress=progress)
        collate = partial(tensors_of, num_attributes=len(attributes))
        source = rows.encoded(encoder_of(shape, config))
        fit(L2Objective(network), source, collate, _optimizer(network, config), plan, seed, run)
    settings = {
        "config": asdict(config),
        "shape": {**shape._asdict(), "words": asdict(shape.words)},
        "default_surface": facts.default_surface,
    }
    return L2(network, settings)


def _optimizer(network: L2Network, config: L2Config) -> torch.optim.Optimizer:
    """Ids are many and seen seldom: they decay far faster than the rest, so that one seen a few times stays near its author."""
    ids = list(network.notes.parameters())
    rest = [parameter for name, parameter in network.named_parameters() if not name.startswith("notes.")]
    groups = [{"params": ids, "weight_decay": config.id_weight_decay}, {"params": rest, "weight_decay": config.weight_decay}]
    return torch.optim.AdamW(groups, lr=config.learning_rate)


class L2:
    """Serving side; safe for threads. What changes after construction is what it keeps of the notes, which changes no score.

    user_features, note_features: the names, in order, of what `score` takes. heads: what it answers. table_ND: float32 [N + 1,
    D], the notes' embeddings in the order of `shape.words.note_ids`; row 0, of an unknown note, is zeros.
    """

    def __init__(self, network: L2Network, settings: dict):
        self.network, self.settings = network.eval(), settings
        shape = _shape_of(settings)
        self.user_features, self.note_features = shape.user_features, shape.note_features
        self.heads: tuple[str, ...] = tuple(settings["config"]["heads"])
        self.history_length: int = settings["config"]["history_length"]
        self.shape = shape
        self._code_of = {note_id: row + 1 for row, note_id in enumerate(shape.words.note_ids)}
        self._surface_of = {surface: row + 1 for row, surface in enumerate(shape.surfaces)}
        self._default_surface = self._surface_of.get(settings["default_surface"] or "", 0)
        self._attributes = AttributeInputs(shape.attributes)
        with torch.inference_mode():
            self.table_ND = network.notes.table()
        self._scorer = L2Scorer(network, self.table_ND)

    def score(
        self,
        user: np.ndarray,
        history_note_ids: Sequence[str],
        note_ids: Sequence[str],
        notes: np.ndarray,
        *,
        surface: str | None = None,
        user_attributes: str | None = None,
    ) -> dict[str, np.ndarray]:
        """Head -> float32 [N] probabilities; a row's depends on nothing in the other rows.

        user: raw values [Fu] in the order of user_features; notes: [N, Fn] in the order of note_features; NaN for NULL.
        history_note_ids: oldest first (what was watched before the log, then the clicks); the last `history_length` count.
        surface: where the feed is shown; None or unknown takes the one seen most in training. user_attributes: the JSON of
        `lake.users.attributes`, or None. Raises ValueError on wrong shapes.
        """
        return self.score_many([RankingRequest(user, notes, surface, history_note_ids, note_ids, user_attributes)])[0]

    def score_many(self, requests: Sequence[RankingRequest]) -> list[dict[str, np.ndarray]]:
        """`score` of each, in one pass over all their candidates. A request's scores do not depend on the others': bit for bit
        where the rows of all come to the same bucket (`request_inputs.filled_up`), else within 2e-6."""
        if not requests:
            return []
        scores_RTN = self._scorer([self._asked(request) for request in requests])
        return [dict(zip(self.heads, scores_TN, strict=True)) for scores_TN in scores_RTN]

    def forget(self) -> None:
        """Keeps nothing of the requests so far: the next is scored as a first one is."""
        self._scorer.forget()

    def _asked(self, request: RankingRequest) -> Asked:
        check_shapes(NAME, request.user, request.notes, self.user_features, self.note_features)
        if len(request.note_ids) != len(request.notes):
            raise ValueError(
                f"note_ids and notes must have one row per candidate, got {len(request.note_ids)} and {len(request.notes)}"
            )
        history = self.encoded_notes(request.history_note_ids[-self.history_length :])[::-1]
        codes = self.encoded_notes(request.note_ids)
        attributes_A = self.encoded_attributes(request.user_attributes)
        return Asked(request.user, self.code_of_surface(request.surface), attributes_A, history, codes, request.notes)

    def code_of_surface(self, surface: str | None) -> int:
        """Its row in the embedding; None and the unknown have that of the surface seen most in training."""
        return self._surface_of.get(surface or "", self._default_surface)

    def encoded_notes(self, note_ids: Sequence[str]) -> np.ndarray:
        """int64 [N]: rows of `table_ND`, 0 for notes that training did not know."""
        return np.array([self._code_of.get(note_id, 0) for note_id in note_ids], dtype=np.int64)

    def encoded_history(self, note_ids: Sequence[str]) -> np.ndarray:
        """int64 [L], newest first, 0 = padding or unknown, of ids that come oldest first."""
        codes_L = np.zeros(self.history_length, dtype=np.int64)
        newest = self.encoded_notes(note_ids[-self.history_length :])[::-1]
        codes_L[: len(newest)] = newest
        return codes_L

    def encoded_attributes(self, attributes: str | None) -> np.ndarray:
        """float32 [A] of 0 and 1, from the JSON of `lake.users.attributes`."""
        return self._attributes.encode([attributes])[0]

    @torch.inference_mode()
    def score_rows(self, examples: Examples, rows: np.ndarray, batch_size: int = 2048) -> dict[str, np.ndarray]:
        """Head -> float32 [len(rows)]: the export's rows, each as a request with one candidate."""
        return self._by_head(self.logits_rows(examples, rows, batch_size))

    @torch.inference_mode()
    def logits_rows(self, examples: Examples, rows: np.ndarray, batch_size: int = 2048) -> Tensor:
        """float32 [K, len(rows), T]: what `score_rows` turns into probabilities."""
        inputs = inputs_of(examples, self.shape, self.history_length)
        parts = [
            _logits_of_rows(self.network, inputs, some, self.table_ND) for some in torch.from_numpy(rows).split(batch_size)
        ]
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def rescale(self, lines: Mapping[str, tuple[float, float]]) -> None:
        """Makes a head's logits slope * logit + intercept, in the last layer's weights: files, exports and kernels follow.

        lines: head -> (slope, intercept). For a model that is not yet shared between threads.
        """
        for column, head in enumerate(self.heads):
            slope, intercept = lines.get(head, (1.0, 0.0))
            self.network.last_KHT[..., column] *= slope
            self.network.last_bias_KT[..., column] = slope * self.network.last_bias_KT[..., column] + intercept
        self._scorer = L2Scorer(self.network, self.table_ND)

    def to_files(self) -> dict[str, bytes]:
        """The registry's files of this model."""
        return bundle.to_files(self.network, self.settings)

    def _by_head(self, logits_KNT: Tensor) -> dict[str, np.ndarray]:
        probability_NT = torch.sigmoid(logits_KNT).mean(0)
        return {head: probability_NT[:, column].numpy() for column, head in enumerate(self.heads)}


def load(path: Path) -> L2:
    """path: a version's folder, as `Registry.path` gives it."""
    settings = bundle.read_settings(path)
    config = settings["config"]
    network = L2Network(L2Config(**{**config, "heads": tuple(config["heads"])}), _shape_of(settings))
    bundle.read_weights(network, path)
    return L2(network, settings)


def _shape_of(settings: dict) -> Shape:
    shape = settings["shape"]
    lists = {name: tuple(shape[name]) for name in ("user_features", "note_features", "surfaces", "attributes")}
    return Shape(words=NoteWords(**shape["words"]), **lists)
