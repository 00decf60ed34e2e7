"""A causal transformer over item sequences that predicts the next item at every place.

Pre-norm blocks with gates on both branches and SwiGLU networks, rotary positions, one table for input and output items, unit
vectors and a learned temperature at the output, softmax over all items or over sampled ones with logQ correction.
B sequences, L places (oldest first, padded behind), T = places with a target, D width, H heads, I items, S sampled items.
Sources: SASRec (Kang and McAuley, ICDM 2018), its full cross-entropy (Klenitskiy and Vasilev, RecSys 2023), LiGR (Borisyuk et
al., 2025) as in eSASRec (RecSys 2025), RoPE (Su et al., 2021), logQ (Yi et al., RecSys 2019).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TransformerConfig:
    """length: places read; sampled: items in the softmax beside the targets, 0 for all of them."""

    length: int
    width: int = 64
    heads: int = 2
    layers: int = 2
    dropout: float = 0.3
    sampled: int = 0
    label_smoothing: float = 0.0
    temperature: float = 0.07


class Block(nn.Module):
    """x + gate(x) * attention(norm(x)), then x + gate(x) * network(norm(x))."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 4 * width)
        self.out = nn.Linear(width, width)
        self.up_and_gates = nn.Linear(width, 5 * width)
        self.down = nn.Linear(2 * width, width)
        # a block that adds nothing yet: the untrained network answers with items like the last one
        for last in (self.out, self.down):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, places_BLD: Tensor, rotation_2LE: Tensor) -> Tensor:
        size_B, length, width = places_BLD.shape
        projected = self.query_key_value(self.attention_norm(places_BLD))
        query, key, value = (
            part.view(size_B, length, self.heads, -1).transpose(1, 2) for part in projected[..., : 3 * width].chunk(3, dim=-1)
        )
        read = F.scaled_dot_product_attention(rotated(query, rotation_2LE), rotated(key, rotation_2LE), value, is_causal=True)
        read_BLD = self.out(read.transpose(1, 2).reshape(size_B, length, width))
        gate_BLD = torch.sigmoid(projected[..., 3 * width :])
        places_BLD = places_BLD + F.dropout(gate_BLD * read_BLD, self.dropout, self.training)
        up, switch, gate_BLD = self.up_and_gates(self.network_norm(places_BLD)).split([2 * width, 2 * width, width], dim=-1)
        hidden = F.dropout(F.silu(switch) * up, self.dropout, self.training)
        return places_BLD + F.dropout(torch.sigmoid(gate_BLD) * self.down(hidden), self.dropout, self.training)


def rotations(length: int, size: int) -> Tensor:
    """float32 [2, L, size / 2]: cosines and sines of place * 10000 ** (-2e / size)."""
    angles = torch.arange(length)[:, None] * torch.pow(10_000.0, -torch.arange(0, size, 2) / size)
    return torch.stack([angles.cos(), angles.sin()])


def rotated(inputs_BHLE: Tensor, rotation_2LE: Tensor) -> Tensor:
    """Each pair (first half, second half) turned by its place's angle, so that a product of two depends on their distance."""
    cos_LE, sin_LE = rotation_2LE
    first, second = inputs_BHLE.chunk(2, dim=-1)
    return torch.cat([first * cos_LE - second * sin_LE, first * sin_LE + second * cos_LE], dim=-1)


class Transformer(nn.Module):
    """Item code i is row i + 1 of the table; row 0 is padding."""

    def __init__(self, num_items: int, config: TransformerConfig, start_ID: Tensor | None = None):
        """start_ID: unit vectors that the items start from; None draws them."""
        super().__init__()
        self.config = config
        self.items = nn.Embedding(num_items + 1, config.width, padding_idx=0)
        nn.init.normal_(self.items.weight, std=config.width**-0.5)
        if start_ID is not None:
            with torch.no_grad():
                self.items.weight[1:] = start_ID
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        self.register_buffer("rotation_2LE", rotations(config.length, config.width // config.heads), persistent=False)

    def forward(self, rows_BL: Tensor) -> Tensor:
        """unit vectors [B, L, D] of what comes after each place. rows_BL: item code + 1, 0 behind the end."""
        places_BLD = F.dropout(self.items(rows_BL), self.config.dropout, self.training)
        rotation_2LE = self.rotation_2LE[:, : rows_BL.shape[1]]  # type: ignore[index]
        for block in self.blocks:
            places_BLD = block(places_BLD, rotation_2LE)
        return F.normalize(self.norm(places_BLD), dim=-1)

    def item_vectors(self) -> Tensor:
        """Unit vectors [I, D]."""
        return F.normalize(self.items.weight[1:], dim=-1)

    def loss(self, rows_BL: Tensor, asked_T: Tensor, target_T: Tensor, generator: torch.Generator) -> Tensor:
        """Mean cross entropy, in nats, of target_T (item codes) at the places asked_T of rows_BL, laid end to end."""
        next_TD = self(rows_BL).flatten(0, 1).index_select(0, asked_T) * self.log_scale.exp()
        # products of unit vectors times up to a hundred: bf16 would round the logits to tenths
        with torch.autocast(rows_BL.device.type, enabled=False):
            if self.config.sampled:
                return self._sampled_loss(next_TD, target_T, generator)
            return F.cross_entropy(next_TD @ self.item_vectors().T, target_T, label_smoothing=self.config.label_smoothing)

    def _sampled_loss(self, next_TD: Tensor, target_T: Tensor, generator: torch.Generator) -> Tensor:
        """One uniform sample is shared by the batch; log(I / S) more for each stands for the items that were not drawn.
        generator: on the device of the rest."""
        num_items = self.items.num_embeddings - 1
        drawn_S = torch.randint(num_items, (self.config.sampled,), generator=generator, device=next_TD.device)
        target_TD, drawn_SD = (F.normalize(self.items(codes + 1), dim=-1) for codes in (target_T, drawn_S))
        drawn_TS = next_TD @ drawn_SD.T + math.log(num_items / len(drawn_S))
        drawn_TS = drawn_TS.masked_fill(drawn_S == target_T[:, None], -torch.inf)
        logits = torch.cat([(next_TD * target_TD).sum(-1, keepdim=True), drawn_TS], dim=1)
        return F.cross_entropy(logits, torch.zeros_like(target_T))
