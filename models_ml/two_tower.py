"""Two towers for retrieval: a reader's vector from their history and features, a note's from its id, author, topic and content.

Both are unit vectors; their product ranks notes. All but a note's id is known once it is made, so a new note has a vector
before its first view; in training the id is dropped at times so that the rest learns to stand alone. Loss: softmax over the
notes of the batch (drawn as often as they are clicked) and uniform draws, with logQ correction for the mixture (Yi et al.,
RecSys 2019; Yang et al., WWW 2020).
B pairs in a batch, U uniform draws, C = B + U candidates, L places of a history (newest first, code 0 = padding), V values of
a reader (features, then attributes), P places of a note's content, D width, N notes.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.sampled_softmax import sampled_softmax
from models_ml import bundle
from models_ml.attributes import AttributeInputs
from models_ml.examples import Examples, encode, first_topics
from models_ml.features import FeatureInputs
from models_ml.notes import NoteTower, NoteWords, embedding
from models_ml.request_inputs import LinearShare, add_products
from models_ml.seeding import seeded
from models_ml.tower_inputs import NoteContent, ReaderInputs
from models_ml.trainer.fit import Run, fit
from models_ml.trainer.rows import ArraySource, Rows
from models_ml.trainer.settings import Plan
from warehouse.errors import HeadraceError


@dataclass(frozen=True)
class TwoTowerConfig:
    """epochs count passes over the pairs; pairs_per_reader limits those made from what was watched before the log.
    uniform_negatives: notes drawn for each batch, all alike, so that those nobody clicks are learned of too; 0 draws none.
    user_features: what the user tower reads beside the history: names or patterns of the reader's features, and `attributes`.
    note_features: what the note tower reads beside id, author and first topic: columns of `lake.notes` (text, lists, numbers).
    """

    width: int = 48
    history_length: int = 30
    epochs: int = 3
    batch_size: int = 1024
    learning_rate: float = 3e-3
    temperature: float = 0.07
    id_dropout: float = 0.1
    pairs_per_reader: int = 8
    weight_decay: float = 1e-3
    uniform_negatives: int = 256
    user_features: tuple[str, ...] = ()
    note_features: tuple[str, ...] = ("duration_ms", "note_type", "topics")

    def __post_init__(self) -> None:
        if self.uniform_negatives < 0:
            raise ValueError(f"uniform_negatives must be at least 0, got {self.uniform_negatives}")


def mixed_softmax_loss(user_BD: Tensor, item_CD: Tensor, item_C: Tensor, log_q_C: Tensor, temperature: float) -> Tensor:
    """Cross entropy, in nats, of each reader's own note, which is in the first B rows, against all others; mean over B.

    user_BD, item_CD: unit rows. item_C: the notes' codes; another row with the same note is not a negative. log_q_C: natural
    log of the chance that a note is drawn as a candidate, <= 0. Raises ValueError on unequal sizes or a temperature <= 0.
    """
    size, sizes = len(user_BD), (len(item_CD), len(item_C), len(log_q_C))
    if len(set(sizes)) != 1 or sizes[0] < size:
        raise ValueError(f"item_CD, item_C and log_q_C must share one size, at least that of user_BD, got {sizes} and {size}")
    own = item_CD[:size], log_q_C[:size], item_C[:size]
    return sampled_softmax(user_BD, own[0], item_CD, own[1], log_q_C, own[2], item_C, temperature).mean()


class TwoTowerNetwork(nn.Module):
    """The note table [N + 1, D] from nothing; readers' vectors [B, D] from histories [B, L] of codes, that table and what is
    known of the readers [B, V]."""

    content_of_note: Tensor

    def __init__(self, config: TwoTowerConfig, words: NoteWords, reader: ReaderInputs, content: NoteContent):
        super().__init__()
        self.notes = NoteTower(words, config.width, config.id_dropout)
        self.recency_L = nn.Parameter(-0.05 * torch.arange(config.history_length, dtype=torch.float32))
        self.attend = nn.Linear(config.width, 1, bias=False)
        self.mix = nn.Linear(config.width, config.width)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)
        # what a model does not read it has no weights of
        self.num_features, self.num_values = len(reader.features), len(reader)
        if reader:
            self.reader_inputs = FeatureInputs(reader.features)
            self.of_reader = nn.Linear(self.reader_inputs.num_inputs + len(reader.attributes), config.width, bias=False)
            nn.init.zeros_(self.of_reader.weight)
        self.has_content = len(content) > 0
        if self.has_content:
            self.content = embedding(len(content), config.width, spread=0.0)
            self.register_buffer("content_of_note", torch.zeros(len(words.note_ids) + 1, content.places, dtype=torch.int64))

    def note_table(self) -> Tensor:
        """float32 [N + 1, D], unit rows; row 0 is zeros."""
        return self._unit(self.notes.table(), self.content_of_note if self.has_content else None)

    def table_of_batch(self, history_BL: Tensor, item_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rows of the note table, history_BL and item_B as places in them): of the notes that occur, where there are more
        notes than places in the batch, so that a step costs what its batch does and not what the table does."""
        places = history_BL.numel() + item_B.numel() + 1
        if len(self.notes.author_of_note) <= places:
            return self.note_table(), history_BL, item_B
        padding_1 = item_B.new_zeros(1)  # the smallest code, so that it is place 0 here too
        codes_C, place_C = torch.unique(torch.cat([padding_1, history_BL.flatten(), item_B]), return_inverse=True)
        table_CD = self._unit(self.notes.rows(codes_C), self.content_of_note[codes_C] if self.has_content else None)
        return table_CD, place_C[1 : 1 + history_BL.numel()].view_as(history_BL), place_C[-item_B.numel() :]

    def rows_of(self, note_B: Tensor, author_B: Tensor, topic_B: Tensor, content_BP: Tensor) -> Tensor:
        """float32 [B, D], unit rows, of notes by their codes; zeros where nothing is known."""
        return self._unit(self.notes(note_B, author_B, topic_B), content_BP if self.has_content else None)

    def _unit(self, note_CD: Tensor, content_CP: Tensor | None) -> Tensor:
        if content_CP is not None:
            note_CD = note_CD + self.content(content_CP).sum(1)
        return F.normalize(note_CD, dim=-1, eps=1e-6)

    def user_vectors(
        self, history_BL: Tensor, table_ND: Tensor, reader_BV: Tensor | None = None, shift_BD: Tensor | None = None
    ) -> Tensor:
        """float32 [B, D], unit rows; zeros for an empty history of which nothing else is read. reader_BV: raw values, NaN for
        NULL, of a network that reads them. shift_BD: added before the rows are made unit ones."""
        note_BLD = F.embedding(history_BL, table_ND)
        is_there_BL = history_BL > 0
        weight_BL = (self.attend(note_BLD).squeeze(-1) + self.recency_L).masked_fill(~is_there_BL, -1e9)
        pooled_BD = torch.bmm((torch.softmax(weight_BL, dim=-1) * is_there_BL).unsqueeze(1), note_BLD).squeeze(1)
        mixed_BD = (pooled_BD + self.mix(pooled_BD)) * is_there_BL.any(dim=1, keepdim=True)
        if reader_BV is not None:
            features_BF, attributes_BA = reader_BV.split([self.num_features, self.num_values - self.num_features], dim=1)
            mixed_BD = mixed_BD + self.of_reader(torch.cat([self.reader_inputs(features_BF), attributes_BA], dim=1))
        if shift_BD is not None:
            mixed_BD = mixed_BD + shift_BD
        return F.normalize(mixed_BD, dim=-1, eps=1e-6)


@dataclass(frozen=True)
class Pairs:
    """history_BL: codes of notes, target_B: the one that came next, reader_BV: what `ReaderInputs` knew of the reader then,
    is_before_B: whether that was before the log began."""

    history_BL: np.ndarray
    target_B: np.ndarray
    reader_BV: np.ndarray
    is_before_B: np.ndarray


def training_pairs(examples: Examples, note_ids: Sequence[str], config: TwoTowerConfig, reader: ReaderInputs) -> Pairs:
    """Each click before `test_start`, and each reader's newest `pairs_per_reader` steps through what they had watched before
    the log began; of those no features are known."""
    length = config.history_length
    clicked = examples.train_rows[examples.labels["click"][examples.train_rows] == 1]
    click_targets = encode(examples.words["note_id"], note_ids)[clicked]

    before = examples.users["history_note_ids"].combine_chunks()
    codes = np.append(encode(before.values, note_ids), 0)
    ends_U, size_U = before.offsets.to_numpy()[1:], np.diff(before.offsets.to_numpy())
    steps_U = np.clip(size_U - 1, 0, config.pairs_per_reader)
    reader_S = np.repeat(np.arange(len(size_U)), steps_U)
    back_S = np.arange(len(reader_S)) - np.repeat(np.cumsum(steps_U) - steps_U, steps_U)
    at_S = ends_U[reader_S] - 1 - back_S
    source_SL = at_S[:, None] - 1 - np.arange(length)
    is_inside_SL = source_SL >= (ends_U - size_U)[reader_S][:, None]
    watched_SL = np.where(is_inside_SL, codes[source_SL], 0)

    histories = np.concatenate([examples.histories(note_ids, length)[clicked], watched_SL])
    targets = np.concatenate([click_targets, codes[at_S]])
    readers = np.concatenate([reader.of_rows(examples, clicked), reader.of_users(examples)[reader_S]])
    usable = (targets > 0) & (histories > 0).any(axis=1)
    is_before = np.arange(len(targets)) >= len(clicked)
    return Pairs(histories[usable].astype(np.int32), targets[usable], readers[usable], is_before[usable])


class TwoTowerObjective(nn.Module):
    """The loss of a batch of pairs, summed over them. log_q_N: natural log of the chance that a note is a row's positive.

    before_D is added to the readers' vectors of pairs from before the log, when another mix of notes was shown, and to none
    that is served: it is no part of the model.
    """

    log_q_N: Tensor

    def __init__(self, network: TwoTowerNetwork, log_q_N: Tensor, temperature: float, uniform_negatives: int = 0):
        super().__init__()
        self.network, self.temperature, self.uniform_negatives = network, temperature, uniform_negatives
        self.before_D = nn.Parameter(torch.zeros(network.mix.out_features))
        self.register_buffer("log_q_N", log_q_N)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        item_C, log_q_C = self._candidates(batch["target"])
        table_ND, history_BL, place_C = self.network.table_of_batch(batch["history"], item_C)
        shift_BD = batch["is_before"].unsqueeze(1) * self.before_D
        user_BD = self.network.user_vectors(history_BL, table_ND, batch.get("reader"), shift_BD)
        item_CD = F.embedding(place_C, table_ND)
        # products of unit vectors over a small temperature: rounded to bf16 they would be off by tenths, so autocast must not
        # have them; the kernel of a GPU takes bf16 vectors and adds up in fp32
        kind = torch.bfloat16 if user_BD.is_cuda and torch.is_autocast_enabled("cuda") else torch.float32
        with torch.autocast(user_BD.device.type, enabled=False):
            loss = mixed_softmax_loss(user_BD.to(kind), item_CD.to(kind), item_C, log_q_C, self.temperature)
        return loss * batch["num_pairs"]

    def _candidates(self, item_B: Tensor) -> tuple[Tensor, Tensor]:
        """(codes of the batch's notes, then of the uniform draws; natural log of the chance of each in that mixture). A
        validation draws none: its loss must not depend on chance."""
        log_q_B = self.log_q_N[item_B]
        if not (self.training and self.uniform_negatives):
            return item_B, log_q_B
        size, num_drawn, num_notes = len(item_B), self.uniform_negatives, len(self.log_q_N) - 1
        drawn_U = torch.randint(1, num_notes + 1, (num_drawn,), dtype=item_B.dtype, device=item_B.device)
        item_C = torch.cat([item_B, drawn_U])
        of_clicks_C = self.log_q_N[item_C] + math.log(size / (size + num_drawn))
        of_draws = self.log_q_N.new_tensor(math.log(num_drawn / (size + num_drawn) / num_notes))
        return item_C, torch.logaddexp(of_clicks_C, of_draws)


def train(
    examples: Examples, config: TwoTowerConfig, seed: int, progress: Callable[[int, int], None], run: Run | None = None
) -> "TwoTower":
    """Trains on the rows before `test_start`; the same seed gives the same weights. progress: (steps done, steps in all).

    Over several ranks, a rank's negatives are the notes of its own part of the batch, and its own draws.
    """
    words, reader = NoteWords.of(examples), ReaderInputs.of(examples, config.user_features)
    content = NoteContent.of(examples.notes, config.note_features)
    settings = {"config": asdict(config), "words": asdict(words), "reader": asdict(reader), "content": asdict(content)}
    pairs = training_pairs(examples, words.note_ids, config, reader)
    if len(pairs.target_B) < 2:
        raise HeadraceError(
            f"two_tower needs at least 2 clicks with a history before them, the export has {len(pairs.target_B)}"
        )
    counts_N = torch.bincount(torch.from_numpy(pairs.target_B), minlength=len(words.note_ids) + 1)
    log_q_N = (counts_N.clamp(min=1) / len(pairs.target_B)).log()
    with seeded(seed):
        network = TwoTowerNetwork(config, words, reader, content)
        network.notes.describe(examples.notes, words)
        if network.has_content:
            network.content_of_note[1:] = torch.from_numpy(content.encode(examples.notes))
        if reader:
            network.reader_inputs.fit(pairs.reader_BV[:, : len(reader.features)])
        objective = TwoTowerObjective(network, log_q_N, config.temperature, config.uniform_negatives)
        optimizer = torch.optim.AdamW(objective.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        plan = Plan(config.epochs, config.batch_size, config.learning_rate)
        run = replace(run or Run(), progress=progress)
        fit(objective, ArraySource(rows_of(pairs), examples.fingerprint()), tensors_of, optimizer, plan, seed, run)
    return TwoTower(network, settings)


def rows_of(pairs: Pairs) -> Rows:
    """A pair is a request with one candidate, the note that came next."""
    size, per_row = len(pairs.target_B), {"history": pairs.history_BL, "is_before": pairs.is_before_B}
    if pairs.reader_BV.shape[1]:
        per_row["reader"] = pairs.reader_BV
    return Rows(np.arange(size), per_row, {"target": pairs.target_B}, np.arange(size + 1))


def tensors_of(rows: Rows) -> dict[str, Tensor]:
    """history int32 [B, L], is_before bool [B], reader float32 [B, V] where it is read, target int64 [B], and how many pairs
    these are (none: one pair that does not count)."""
    pairs = rows.or_empty_row()
    target_B = pairs.per_candidate["target"] if len(rows) else np.zeros(1, dtype=np.int64)
    per_row = {name: torch.from_numpy(values) for name, values in pairs.per_row.items()}
    return {**per_row, "target": torch.from_numpy(target_B), "num_pairs": torch.tensor(len(rows))}


class TwoTower:
    """Serving side; read-only after construction, safe for threads.

    note_ids: N ids; note_vectors: float32 [N, D], unit rows in the same order. user_features: the names, in order, of what
    `user_vector` takes.
    """

    def __init__(self, network: TwoTowerNetwork, settings: dict):
        self.network, self.settings = network.eval(), settings
        self.history_length: int = settings["config"]["history_length"]
        self.words, self.reader, self.content = inputs_of(settings)
        self.user_features = self.reader.features
        self.note_ids: list[str] = self.words.note_ids
        self._code_of = {note_id: row + 1 for row, note_id in enumerate(map(sys.intern, self.note_ids))}
        self._attributes = AttributeInputs(self.reader.attributes)
        with torch.inference_mode():
            self._table_ND = network.note_table()
        self.note_vectors: np.ndarray = self._table_ND[1:].numpy()
        self._attend_D, self._recency_L, self._mix_DD, self._mix_bias_D = (
            weight.detach().numpy().copy()
            for weight in (network.attend.weight[0], network.recency_L, network.mix.weight, network.mix.bias)
        )
        if self.reader:
            of_features, of_attributes = network.of_reader.weight.detach().split(
                [network.reader_inputs.num_inputs, len(self.reader.attributes)], dim=1
            )
            self._of_features = LinearShare(network.reader_inputs, of_features)
            self._of_attributes_AD = of_attributes.T.contiguous().numpy()

    def user_vector(
        self, history_note_ids: Sequence[str], user: np.ndarray | None = None, user_attributes: str | None = None
    ) -> np.ndarray:
        """float32 [D], unit length, or zeros where nothing is known of the reader.

        history_note_ids: oldest first; the last `history_length` that the model knows count. user: raw values [Fu] in the order
        of user_features, NaN for NULL; None is all NULL. user_attributes: the JSON of `lake.users.attributes`. Raises
        ValueError on another number of values.
        """
        known = (code for note_id in reversed(history_note_ids) if (code := self._code_of.get(note_id)) is not None)
        kept_n = np.fromiter(islice(known, self.history_length), np.int64) - 1
        mixed_1D = np.zeros((1, self.note_vectors.shape[1]), dtype=np.float32)
        # `TwoTowerNetwork.user_vectors` of one reader, in numpy: each operation of PyTorch gives the interpreter away
        if len(kept_n):
            notes_nD = self.note_vectors.take(kept_n, axis=0)
            weight_n = notes_nD @ self._attend_D + self._recency_L[: len(kept_n)]
            weight_n = np.exp(weight_n - weight_n.max())
            pooled_D = (weight_n / weight_n.sum()) @ notes_nD
            mixed_1D[0] = pooled_D + self._mix_DD @ pooled_D + self._mix_bias_D
        if self.reader:
            values = np.full(len(self.user_features), np.nan) if user is None else user
            if values.shape != (len(self.user_features),):
                raise ValueError(f"user must hold {len(self.user_features)} values, as user_features, got {values.shape}")
            self._of_features.add_to(mixed_1D, values[None].astype(np.float32))
            add_products(self._attributes.encode([user_attributes]), self._of_attributes_AD, mixed_1D)
        return mixed_1D[0] / max(float(np.linalg.norm(mixed_1D)), 1e-6)

    @torch.inference_mode()
    def user_vectors(self, history_BL: np.ndarray, reader_BV: np.ndarray) -> np.ndarray:
        """float32 [B, D] of histories as codes (1 + place in note_ids, 0 = padding), newest first, L = history_length, and of
        `reader.of_rows`."""
        reader = torch.from_numpy(reader_BV) if self.reader else None
        return self.network.user_vectors(torch.from_numpy(history_BL), self._table_ND, reader).float().numpy()

    @torch.inference_mode()
    def vectors_of(self, notes: pa.Table) -> np.ndarray:
        """float32 [n, D] of notes as `lake.notes` describes them (note_id, author_id, topics, the columns of `note_features`):
        those that training did not know have what their authors, topics and content say; zeros if all of it is new."""
        codes = (
            encode(notes["note_id"], self.note_ids),
            encode(notes["author_id"], self.words.authors),
            encode(first_topics(notes), self.words.topics),
            self.content.encode(notes),
        )
        return self.network.rows_of(*map(torch.from_numpy, codes)).numpy()

    def to_files(self) -> dict[str, bytes]:
        """The registry's files of this model."""
        return bundle.to_files(self.network, self.settings)


def inputs_of(settings: dict) -> tuple[NoteWords, ReaderInputs, NoteContent]:
    """What a saved model reads. One from before it read more than histories, ids and topics says nothing of the rest."""
    reader = settings.get("reader", {"features": (), "attributes": ()})
    words = NoteWords(**settings["words"])
    return (
        words,
        ReaderInputs(tuple(reader["features"]), tuple(reader["attributes"])),
        NoteContent(**settings.get("content", {})),
    )


def load(path: Path) -> TwoTower:
    """path: a version's folder, as `Registry.path` gives it."""
    settings = bundle.read_settings(path)
    network = TwoTowerNetwork(TwoTowerConfig(**settings["config"]), *inputs_of(settings))
    bundle.read_weights(network, path)
    return TwoTower(network, settings)
