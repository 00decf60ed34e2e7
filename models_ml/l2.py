"""L2, the final ranker: rows for its network (`l2_network`), training, and the model that scores requests.

B requests, C candidates of each (1 in training), R rows, L places of a history (newest first, code 0 = padding), D width, K
members, T heads (tasks), U and I inputs of the reader and of a candidate.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from models_ml import bundle, ranking_rows, request_rows
from models_ml.attributes import AttributeInputs
from models_ml.examples import Examples
from models_ml.first_layer import FirstLayer
from models_ml.l2_network import L2Config, L2Network, Shape
from models_ml.l2_scorer import Asked, L2Scorer
from models_ml.notes import NoteWords
from models_ml.request_rows import AnyRows, Encode, RequestTable
from models_ml.row_memo import RowMemo
from models_ml.scoring import Notes, RankingRequest, notes_of
from models_ml.seeding import seeded
from models_ml.trainer.fit import Run, fit
from models_ml.trainer.rows import Rows
from models_ml.trainer.settings import Plan
from warehouse.errors import HeadraceError

NAME = "l2"


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
    config = replace(config, heads=config.heads or request_rows.labels_of(rows))
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
        self._code_of = {note_id: row + 1 for row, note_id in enumerate(map(sys.intern, shape.words.note_ids))}
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
        notes: np.ndarray | Notes,
        *,
        surface: str | None = None,
        user_attributes: str | None = None,
        rows: np.ndarray | None = None,
        codes: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Head -> float32 [N] probabilities; a row's depends on nothing in the other rows.

        user: raw values [Fu] in the order of user_features; notes: [N, Fn] in the order of note_features, NaN for NULL, or what
        can give them.
        history_note_ids: oldest first (what was watched before the log, then the clicks); the last `history_length` count.
        surface: where the feed is shown; None or unknown takes the one seen most in training. user_attributes: the JSON of
        `lake.users.attributes`, or None. rows: as `L1.score` takes them; by default a note's place among those of training.
        codes: `encoded_notes(note_ids)`, where the caller has them; note_ids are then not read. Raises ValueError on wrong
        shapes.
        """
        request = RankingRequest(user, notes, surface, history_note_ids, note_ids, user_attributes, rows, codes)
        return self.score_many([request])[0]

    def score_many(self, requests: Sequence[RankingRequest]) -> list[dict[str, np.ndarray]]:
        """`score` of each; the first layer is filled for all their candidates together. A request's scores are the same bit for
        bit whichever others came with it."""
        if not requests:
            return []
        scores_RTN = self._scorer([self._asked(request) for request in requests])
        return [dict(zip(self.heads, scores_TN, strict=True)) for scores_TN in scores_RTN]

    @property
    def first_layer(self) -> FirstLayer:
        """Keeps of a note, by its number, what is tagged with its code."""
        return self._scorer.first_layer

    @property
    def memo(self) -> RowMemo:
        """What it keeps of the notes."""
        return self.first_layer.memo

    def forget(self) -> None:
        """Keeps nothing of the requests so far: the next is scored as a first one is."""
        self.memo.forget()

    def _asked(self, request: RankingRequest) -> Asked:
        notes = notes_of(NAME, request, self.user_features, self.note_features)
        if request.codes is None and len(request.note_ids) != len(request.notes):
            raise ValueError(
                f"note_ids and notes must have one row per candidate, got {len(request.note_ids)} and {len(request.notes)}"
            )
        history = self.encoded_notes(request.history_note_ids[-self.history_length :])[::-1]
        codes = self.encoded_notes(request.note_ids) if request.codes is None else request.codes
        rows = np.where(codes > 0, codes, -1) if request.rows is None else request.rows
        attributes_A = self.encoded_attributes(request.user_attributes)
        return Asked(request.user, self.code_of_surface(request.surface), attributes_A, history, codes, rows, notes)

    def code_of_surface(self, surface: str | None) -> int:
        """Its row in the embedding; None and the unknown have that of the surface seen most in training."""
        return self._surface_of.get(surface or "", self._default_surface)

    def encoded_notes(self, note_ids: Sequence[str]) -> np.ndarray:
        """int64 [N]: rows of `table_ND`, 0 for notes that training did not know."""
        return np.fromiter(map(self._code_of.get, note_ids, repeat(0)), np.int64, len(note_ids))

    def encoded_history(self, note_ids: Sequence[str]) -> np.ndarray:
        """int64 [L], newest first, 0 = padding or unknown, of ids that come oldest first."""
        codes_L = np.zeros(self.history_length, dtype=np.int64)
        newest = self.encoded_notes(note_ids[-self.history_length :])[::-1]
        codes_L[: len(newest)] = newest
        return codes_L

    def encoded_attributes(self, attributes: str | None) -> np.ndarray:
        """float32 [A] of 0 and 1, from the JSON of `lake.users.attributes`."""
        return self._attributes.encode_one(attributes)

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
