"""Training of the transformer on a set of sequences: settings from the set's statistics, the epoch chosen on validation."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import diags
from scipy.sparse.linalg import eigsh
from torch import Tensor

from models_ml.benchmark.directed import DirectedConfig, counted
from models_ml.benchmark.protocol import Question, figures, places_of
from models_ml.benchmark.sequences import Sequences
from models_ml.benchmark.transformer import Transformer, TransformerConfig

CHOSEN_BY = "ndcg@10"
MOST_ASKED = 3000


@dataclass(frozen=True)
class TrainingConfig:
    """epochs: most; patience: validations without a better one before it stops; places: padded places of a batch."""

    network: TransformerConfig
    epochs: int
    places: int
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warm_up_steps: int = 100
    patience: int = 4
    validations: int = 20


def settings(learned: Sequences) -> TrainingConfig:
    """From the numbers of users, items and interactions alone, so that a set nobody has seen gets settings like any other.

    Short sequences and many items call for dropout, long ones for places; the softmax is sampled where all items cost more
    than the rest of the network.
    """
    lengths_U = learned.lengths[learned.lengths > 1]
    mean = float(lengths_U.mean())
    length = int(min(200, max(16, 2 ** math.ceil(math.log2(np.quantile(lengths_U, 0.9))))))
    dropout = float(np.clip(0.5 - 0.1 * math.log2(mean / 10), 0.2, 0.5))
    places = int(2 ** round(math.log2(np.clip(len(learned.items_P) / 400, 512, 2048))))
    sampled = 0 if learned.num_items <= 2048 else 512
    network = TransformerConfig(length=length, dropout=round(dropout, 2), sampled=sampled)
    return TrainingConfig(network, epochs=int(np.clip(2e6 / len(learned.items_P), 12, 30)), places=places)


def count_vectors(learned: Sequences, width: int) -> np.ndarray:
    """Unit vectors float32 [I, D] in which items that occur near one another are near: where training starts.

    The first eigenvectors of the symmetric, degree-normalised counts of `directed`; items without neighbours get a random one.
    """
    rng = np.random.default_rng(0)
    vectors_ID = np.zeros((learned.num_items, width))
    config = DirectedConfig()
    counts_II = counted(learned, config.window, config.decay)
    counts_II = (counts_II + counts_II.T).astype(np.float64)
    degree_I = np.asarray(counts_II.sum(1)).ravel()
    scale = diags(1 / np.sqrt(np.maximum(degree_I, 1e-9)))
    size = min(width, learned.num_items - 2)
    values_D, found_ID = eigsh(scale @ counts_II @ scale, k=size, which="LA", v0=rng.random(learned.num_items))
    vectors_ID[:, :size] = found_ID * np.sqrt(values_D.clip(0))
    norm_I1 = np.linalg.norm(vectors_ID, axis=1, keepdims=True)
    drawn_ID = rng.normal(size=vectors_ID.shape)
    vectors_ID = np.where(norm_I1 > 1e-6, vectors_ID, drawn_ID)
    return (vectors_ID / np.linalg.norm(vectors_ID, axis=1, keepdims=True)).astype(np.float32)


def batches(learned: Sequences, length: int, places: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows_BL, targets_BL) of one epoch; every place with a successor is a target once.

    A sequence longer than `length` is cut at places that differ from epoch to epoch. Sequences of like length share a batch of
    at most `places` padded places.
    """
    windows: list[tuple[int, int]] = []
    for start, size in zip(learned.starts_U1[:-1].tolist(), (learned.lengths - 1).tolist(), strict=True):
        if size < 1:
            continue
        first = size if size <= length else int(rng.integers(1, length + 1))
        cuts = [0, *range(first, size, length), size]
        windows += [(start + low, high - low) for low, high in pairwise(cuts)]
    sizes_W = np.array([size for _, size in windows])
    order_W = np.argsort(sizes_W * rng.uniform(0.9, 1.1, len(sizes_W)) + rng.uniform(0, 1, len(sizes_W)))
    groups: list[list[int]] = [[]]
    widest = 0
    for window in order_W.tolist():
        widest = max(widest, int(sizes_W[window]))
        if groups[-1] and (len(groups[-1]) + 1) * widest > places:
            groups.append([])
            widest = int(sizes_W[window])
        groups[-1].append(window)
    for group in rng.permutation(len(groups)).tolist():
        chosen = groups[group]
        size = int(sizes_W[chosen].max())
        rows_BL = np.zeros((len(chosen), size), dtype=np.int64)
        targets_BL = np.full((len(chosen), size), -1, dtype=np.int64)
        for row, window in enumerate(chosen):
            start, width = windows[window]
            rows_BL[row, :width] = learned.items_P[start : start + width] + 1
            targets_BL[row, :width] = learned.items_P[start + 1 : start + width + 1]
        yield torch.from_numpy(rows_BL), torch.from_numpy(targets_BL)


class Learned:
    """A trained network as a scorer: the last `length` items are read."""

    def __init__(self, network: Transformer):
        self.network = network.eval()
        with torch.inference_mode():
            self._item_ID = network.item_vectors()

    @torch.inference_mode()
    def scores(self, histories: Sequences, users_Q: np.ndarray) -> np.ndarray:
        """float32 [Q, I] logits."""
        parts = [histories.of(user)[-self.network.config.length :] for user in users_Q]
        lengths_Q = torch.tensor([len(part) for part in parts])
        rows_QL = np.zeros((len(parts), int(lengths_Q.max())), dtype=np.int64)
        for row, part in enumerate(parts):
            rows_QL[row, : len(part)] = part + 1
        next_QD = self.network(torch.from_numpy(rows_QL))[torch.arange(len(parts)), lengths_Q - 1]
        return (self.network.log_scale.exp() * next_QD @ self._item_ID.T).numpy()


def train(
    validation: Question,
    config: TrainingConfig,
    seed: int,
    progress: Callable[[str], None],
    checkpoint: Path | None = None,
) -> Learned:
    """Learns from `validation.histories`; keeps the weights that were best on (at most 3,000 of) its targets.

    checkpoint: a file that a run which was cut off goes on from; written after every validation.
    """
    torch.manual_seed(seed)
    learned = validation.histories
    network = Transformer(learned.num_items, config.network, torch.from_numpy(count_vectors(learned, config.network.width)))
    decayed = [weights for weights in network.parameters() if weights.dim() > 1]
    plain = [weights for weights in network.parameters() if weights.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed)
    asked = validation.some(MOST_ASKED)
    every = max(1, config.epochs // config.validations)
    best, best_weights, since, step, first = -1.0, network.state_dict(), 0, 0, 0
    if checkpoint is not None and checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        best, best_weights, since, step, first = (state[name] for name in ("best", "best_weights", "since", "step", "epoch"))
    steps_of_epoch = sum(1 for _ in batches(learned, config.network.length, config.places, np.random.default_rng(0)))
    num_steps = steps_of_epoch * config.epochs
    for epoch in range(first, config.epochs):
        if since >= config.patience:
            break
        network.train()
        total = 0.0
        generator.manual_seed(seed * 100_003 + epoch)
        torch.manual_seed(seed * 100_003 + epoch)
        count = 0
        for rows_BL, targets_BL in batches(learned, config.network.length, config.places, np.random.default_rng([seed, epoch])):
            rate = min(1.0, (step + 1) / config.warm_up_steps) * (
                0.05 + 0.95 * (1 + math.cos(math.pi * min(1, step / num_steps))) / 2
            )
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * rate
            loss = network.loss(rows_BL, targets_BL, generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            total, count, step = total + loss.item(), count + 1, step + 1
        if (epoch + 1) % every and epoch + 1 < config.epochs:
            continue
        value = figures(places_of(Learned(network), asked))[CHOSEN_BY]
        since = 0 if value > best else since + 1
        if value > best:
            best, best_weights = value, {name: weights.clone() for name, weights in network.state_dict().items()}
        progress(
            f"epoch {epoch + 1}/{config.epochs}: loss {total / count:.3f}, validation {CHOSEN_BY} {value:.4f}, best {best:.4f}"
        )
        if checkpoint is not None:
            state = {
                "network": network.state_dict(), "optimizer": optimizer.state_dict(), "best": best,
                "best_weights": best_weights, "since": since, "step": step, "epoch": epoch + 1,
            }  # fmt: skip
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
    network.load_state_dict(best_weights)
    return Learned(network)
