"""L2's network. A short transformer over the reader's history, target attention from each candidate, and an ensemble of small
networks over everything else; one probability per head.

Late fusion: what depends on the reader alone (the encoded history, the reader's half of the first layer) is computed once per
request; each candidate then reads it by itself, so a candidate's score cannot depend on the other candidates.
B requests, C candidates of each (1 in training), L places of a history (newest first, code 0 = padding), D width, K members,
H hidden units, T heads (tasks), U and I inputs of the reader and of a candidate.
Sources: SASRec (Kang and McAuley, ICDM 2018), target attention (Zhou et al., KDD 2018), candidate isolation and late fusion
as in X's open algorithm, shared-weight ensembles (TabM, Gorishniy et al., ICLR 2025).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.sequence_block import BlockWeights, sequence_block
from models_ml.features import FeatureInputs
from models_ml.notes import NoteTower, NoteWords


@dataclass(frozen=True)
class L2Config:
    """heads: names of labels; none are all those that the export has. layers: self-attention over the history; 0 reads the
    notes as they are. rehearsal_days: held back to calibrate on (`calibration`), for a second training; 0 leaves the heads as
    they are."""

    heads: tuple[str, ...] = ()
    history_length: int = 50
    width: int = 24
    layers: int = 1
    attention_heads: int = 2
    hidden: int = 96
    members: int = 2
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
