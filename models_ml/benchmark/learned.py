"""Training of the transformer on a set of sequences: settings from the set's statistics, the epoch chosen on validation.

On a GPU everything lies on it and a step waits for nothing: the body in bf16, products with the items in TF32, weights fp32.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import diags
from scipy.sparse.linalg import eigsh
from torch import Tensor

from models_ml.benchmark.directed import DirectedConfig, counted
from models_ml.benchmark.protocol import Question, figures, places_of
from models_ml.benchmark.sequences import Sequences
from models_ml.benchmark.transformer import Transformer, TransformerConfig
from warehouse.errors import HeadraceError

CHOSEN_BY = "ndcg@10"
MOST_ASKED = 3000
MOST_IN_SOFTMAX = 32_768
"""Items up to which a GPU has them all in the softmax: 25,600 places of fp32 logits are 3.4 GB."""


@dataclass(frozen=True)
class TrainingConfig:
    """epochs: most; patience: validations without a better one before it stops; places: padded places of a batch; seconds: most
    that training may take, 0 for any: the rate falls with the passes or with the time, whichever is further on."""

    network: TransformerConfig
    epochs: int
    places: int
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warm_up_steps: int = 100
    patience: int = 4
    validations: int = 20
    seconds: float = 0.0


def settings(learned: Sequences, large: bool = False) -> TrainingConfig:
    """From the numbers of users, items and interactions alone, so that a set nobody has seen gets settings like any other.

    Short sequences and many items call for dropout, long ones for places; the softmax is sampled where all items cost more
    than the rest of the network. large: for a GPU, a deeper network, many more passes and all items in the softmax.
    """
    lengths_U = learned.lengths[learned.lengths > 1]
    mean = float(lengths_U.mean())
    length = int(min(200, max(16, 2 ** math.ceil(math.log2(np.quantile(lengths_U, 0.9))))))
    dropout = float(np.clip(0.5 - 0.1 * math.log2(mean / 10), 0.2, 0.5))
    places = int(2 ** round(math.log2(np.clip(len(learned.items_P) / 400, 512, 2048))))
    sampled = 0 if learned.num_items <= 2048 else 512
    if large:
        sampled = 0 if learned.num_items <= MOST_IN_SOFTMAX else 2048
        network = TransformerConfig(length, width=128, heads=4, layers=4, dropout=round(dropout, 2), sampled=sampled)
        places = int(2 ** round(math.log2(np.clip(len(learned.items_P) / 40, 4096, 32_768))))
        return TrainingConfig(network, epochs=150, places=places, learning_rate=1e-3, patience=8, validations=30)
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


def batches(
    learned: Sequences, length: int, places: int, rng: np.random.Generator, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows_BL, asked_T, target_T) of one epoch; every place with a successor is a target once.

    rows_BL: item code + 1, 0 behind the end. asked_T: places of rows_BL, laid end to end, that have a successor; target_T: its
    code. A sequence longer than `length` is cut at places that differ from epoch to epoch. Sequences of like length share a
    batch of at most `places` padded places.
    """
    first_W, size_W = _windows(learned, length, rng)
    groups = _groups(size_W, places, rng)
    order_W = np.concatenate(groups)
    # all of an epoch goes to the device at once, and what a batch needs is cut from it without waiting for the device
    items_P, firsts, sizes = (
        torch.from_numpy(part).to(device) for part in (learned.items_P, first_W[order_W], size_W[order_W])
    )
    ends = np.cumsum([len(group) for group in groups])
    for group, end in zip(groups, ends.tolist(), strict=True):
        of_group = slice(end - len(group), end)
        first_B, size_B = firsts[of_group], sizes[of_group]
        width, num_asked = int(size_W[group].max()), int(size_W[group].sum())
        place_L = torch.arange(width, device=device)
        from_P = (first_B[:, None] + place_L).clamp(max=len(items_P) - 2)
        rows_BL = torch.where(place_L < size_B[:, None], items_P[from_P] + 1, 0)
        row_T = torch.repeat_interleave(torch.arange(len(group), device=device), size_B, output_size=num_asked)
        place_T = torch.arange(num_asked, device=device) - (size_B.cumsum(0) - size_B)[row_T]
        yield rows_BL, row_T * width + place_T, items_P[first_B[row_T] + place_T + 1]


def _windows(learned: Sequences, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(first place, size) of each window, int64: its last place has a successor in the sequence."""
    windows: list[tuple[int, int]] = []
    for start, size in zip(learned.starts_U1[:-1].tolist(), (learned.lengths - 1).tolist(), strict=True):
        if size < 1:
            continue
        first = size if size <= length else int(rng.integers(1, length + 1))
        cuts = [0, *range(first, size, length), size]
        windows += [(start + low, high - low) for low, high in pairwise(cuts)]
    first_W, size_W = np.array(windows, dtype=np.int64).T
    return first_W, size_W


def _groups(size_W: np.ndarray, places: int, rng: np.random.Generator) -> list[list[int]]:
    """Windows of like size together, the groups in random order."""
    order_W = np.argsort(size_W * rng.uniform(0.9, 1.1, len(size_W)) + rng.uniform(0, 1, len(size_W)))
    groups: list[list[int]] = [[]]
    widest = 0
    for window in order_W.tolist():
        widest = max(widest, int(size_W[window]))
        if groups[-1] and (len(groups[-1]) + 1) * widest > places:
            groups.append([])
            widest = int(size_W[window])
        groups[-1].append(window)
    return [groups[number] for number in rng.permutation(len(groups)).tolist()]


class Learned:
    """A trained network as a scorer: the last `length` items are read. It stays on the device it was trained on.

    best: CHOSEN_BY on the validation items that the weights were chosen by.
    """

    def __init__(self, network: Transformer, best: float = math.nan):
        self.network, self.best = network.eval(), best
        with torch.inference_mode():
            self._item_ID = network.item_vectors()

    @torch.inference_mode()
    def scores(self, histories: Sequences, users_Q: np.ndarray) -> np.ndarray:
        """float32 [Q, I] logits."""
        device = self._item_ID.device
        parts = [histories.of(user)[-self.network.config.length :] for user in users_Q]
        lengths_Q = torch.tensor([len(part) for part in parts], device=device)
        rows_QL = np.zeros((len(parts), max(map(len, parts))), dtype=np.int64)
        for row, part in enumerate(parts):
            rows_QL[row, : len(part)] = part + 1
        next_QD = self.network(torch.from_numpy(rows_QL).to(device))[torch.arange(len(parts), device=device), lengths_Q - 1]
        return (self.network.log_scale.exp() * next_QD @ self._item_ID.T).cpu().numpy()


def train(
    validation: Question,
    config: TrainingConfig,
    seed: int,
    progress: Callable[[str], None],
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
) -> Learned:
    """Learns from `validation.histories`; keeps the weights that were best on (at most 3,000 of) its targets.

    checkpoint: a file that a run which was cut off goes on from, on any device; written after every validation.
    """
    device = torch.device(device)
    torch.manual_seed(seed)
    learned = validation.histories
    network = Transformer(learned.num_items, config.network, torch.from_numpy(count_vectors(learned, config.network.width)))
    network.to(device)
    optimizer = _optimizer(network, config)
    generator = torch.Generator(device)
    asked = validation.some(MOST_ASKED)
    every = max(1, config.epochs // config.validations)
    state = _State(network)
    if checkpoint is not None and checkpoint.is_file():
        state.read(checkpoint, network, optimizer)
    num_steps = config.epochs * sum(1 for _ in batches(learned, config.network.length, config.places, np.random.default_rng(0)))
    started = time.monotonic() - state.seconds
    out_of_time = bool(config.seconds) and state.seconds >= config.seconds
    for epoch in range(state.epoch, config.epochs):
        if state.is_done or state.since >= config.patience or out_of_time:
            break
        network.train()
        total = torch.zeros((), device=device)
        generator.manual_seed(seed * 100_003 + epoch)
        torch.manual_seed(seed * 100_003 + epoch)
        count = 0
        rng = np.random.default_rng([seed, epoch])
        with _tf32(device):
            for rows_BL, asked_T, target_T in batches(learned, config.network.length, config.places, rng, device):
                share = state.step / num_steps
                if config.seconds:
                    share = max(share, (time.monotonic() - started) / config.seconds)
                rate = config.learning_rate * min(1.0, (state.step + 1) / config.warm_up_steps) * falling(share)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                # entered anew each step: autocast keeps the weights it has rounded until it is left
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    loss = network.loss(rows_BL, asked_T, target_T, generator)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                total += loss.detach()
                count, state.step = count + 1, state.step + 1
                out_of_time = bool(config.seconds) and share >= 1
        state.epoch, state.seconds = epoch + 1, time.monotonic() - started
        if state.epoch % every and state.epoch < config.epochs and not out_of_time:
            continue
        state.judge(figures(places_of(Learned(network), asked))[CHOSEN_BY], network)
        progress(
            f"epoch {state.epoch}/{config.epochs}: loss {float(total) / count:.3f}, validation {CHOSEN_BY} {state.value:.4f}, "
            f"best {state.best:.4f}"
        )
        if checkpoint is not None:
            state.write(checkpoint, network, optimizer)
    if checkpoint is not None and not state.is_done:
        state.finish(checkpoint)
    network.load_state_dict(state.best_weights)
    return Learned(network, state.best)


def changed(config: TrainingConfig, words: Sequence[str]) -> TrainingConfig:
    """words: `name=value`, names of TrainingConfig and of its network. Raises HeadraceError for any other."""
    kinds = {field.name: (part, field.type) for part in (TrainingConfig, TransformerConfig) for field in fields(part)}
    del kinds["network"]
    given: dict[type, dict[str, float]] = {TrainingConfig: {}, TransformerConfig: {}}
    for word in words:
        name, _, value = word.partition("=")
        if name not in kinds:
            raise HeadraceError(f"--setting {word}: {name!r} is not a setting; they are {', '.join(sorted(kinds))}")
        part, kind = kinds[name]
        try:
            given[part][name] = int(value) if kind is int else float(value)
        except ValueError:
            raise HeadraceError(f"--setting {word}: {name} takes {'a whole' if kind is int else 'a'} number") from None
    network = replace(config.network, **given[TransformerConfig])  # type: ignore[arg-type]
    if network.width % (2 * network.heads):
        raise HeadraceError(f"--setting: width {network.width} must be a multiple of twice heads, {network.heads}")
    return replace(config, network=network, **given[TrainingConfig])  # type: ignore[arg-type]


def falling(share: float) -> float:
    """Share of the learning rate after that share of the training: a cosine from 1 to 0.05."""
    return 0.05 + 0.95 * (1 + math.cos(math.pi * min(1.0, share))) / 2


class _State:
    """Where a training is. seconds: that it has taken; since: validations since the best."""

    def __init__(self, network: Transformer):
        self.epoch, self.step, self.since, self.seconds = 0, 0, 0, 0.0
        self.value = self.best = -1.0
        self.is_done = False
        self.best_weights = _copied(network)

    def judge(self, value: float, network: Transformer) -> None:
        self.value = value
        self.since = 0 if value > self.best else self.since + 1
        if value > self.best:
            self.best, self.best_weights = value, _copied(network)

    def read(self, file: Path, network: Transformer, optimizer: torch.optim.Optimizer) -> None:
        kept = torch.load(file, weights_only=True, map_location="cpu")
        if not kept["is_done"]:
            network.load_state_dict(kept.pop("network"))
            optimizer.load_state_dict(kept.pop("optimizer"))
        vars(self).update(kept)

    def write(self, file: Path, network: Transformer, optimizer: torch.optim.Optimizer) -> None:
        _saved({**vars(self), "network": network.state_dict(), "optimizer": optimizer.state_dict()}, file)

    def finish(self, file: Path) -> None:
        """Only what was best is kept."""
        self.is_done = True
        _saved(vars(self), file)


def _saved(kept: dict[str, Any], file: Path) -> None:
    torch.save(kept, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def _copied(network: Transformer) -> dict[str, Tensor]:
    return {name: weights.clone() for name, weights in network.state_dict().items()}


def _optimizer(network: Transformer, config: TrainingConfig) -> torch.optim.Optimizer:
    decayed = [weights for weights in network.parameters() if weights.dim() > 1]
    plain = [weights for weights in network.parameters() if weights.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    is_on_gpu = next(network.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True if is_on_gpu else None)


@contextlib.contextmanager
def _tf32(device: torch.device) -> Iterator[None]:
    """fp32 products of a GPU read 10 bits of fraction. On a CPU nothing changes."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
