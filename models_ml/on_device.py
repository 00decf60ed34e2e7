"""The rankers and the two-tower search on a GPU: one copy in, one captured graph, one copy out.

On a CPU the models score faster by themselves; all this runs there too, without the graph, and comes to the same. A request's
features and raw 64-bit ids are packed into one pinned buffer, so that the driver is called once; embedding rows are found by
hash there. A ranker is captured at bucketed numbers of candidates (`kernels.graphed`) and called plainly where it cannot
be. One request at a time: replays share their tensors.
N candidates, L places of a history (newest first), D width, V vectors.
"""

import copy
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.embedding_lookup import EMPTY_ID, build_tables, embedding_lookup
from kernels.feature_arena import ALIGNMENT_BYTES, FeatureArena
from kernels.graphed import Graphed, Recording, record_cuda_graph
from kernels.top_k import SMALLEST_PROBLEM, top_k
from models_ml.l1 import L1
from models_ml.l2 import L2
from models_ml.scoring import Notes, RankingRequest, notes_of
from warehouse.errors import HeadraceError

Record = Callable[..., Recording]


def device_from_env() -> torch.device:
    """HEADRACE_DEVICE, `cpu` where it says nothing. Raises HeadraceError unless it is a CPU or a GPU that is there."""
    name = os.environ.get("HEADRACE_DEVICE") or "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise HeadraceError(f"HEADRACE_DEVICE must be cpu, cuda or cuda:<number>, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise HeadraceError(
            f"HEADRACE_DEVICE={name}, but PyTorch finds {torch.cuda.device_count()} GPUs; leave it out to serve from the CPU"
        )
    return device


def raw_id(note_id: str) -> int:
    """64 signed bits of a note's id, the same within this process only, which is where the tables are built. Python keeps a
    string's hash with it, so that 500 candidates cost 30 us."""
    return hash(note_id)


def _raw_ids(note_ids: Sequence[str]) -> np.ndarray:
    return np.array([raw_id(note_id) for note_id in note_ids], dtype=np.int64)


class _Ranker:
    """`function(request tensors ..., candidate tensors ...)` on a device. In: numpy, by name. Out: numpy [N, ...]."""

    def __init__(
        self, function: Callable[..., Tensor], batched: tuple[bool, ...], num_bytes: int, device: torch.device, record: Record
    ):
        self.arena = FeatureArena(num_bytes + len(batched) * ALIGNMENT_BYTES, device)
        self.graphed = Graphed(function, batched, record=record)
        self._lock = threading.Lock()

    def __call__(self, **values: np.ndarray) -> np.ndarray:
        with self._lock, torch.inference_mode():
            return self.graphed(*self._sent(values)).cpu().numpy()

    def warm_up(self, **values: np.ndarray) -> None:
        """Captures every bucket before the first request. values: any one candidate's."""
        with self._lock, torch.inference_mode():
            self.graphed.warm_up(*self._sent(values))

    def _sent(self, values: dict[str, np.ndarray]) -> list[Tensor]:
        kinds = {name: torch.int64 if value.dtype == np.int64 else torch.float32 for name, value in values.items()}
        views = self.arena.reserve({name: (kinds[name], value.shape) for name, value in values.items()})
        for name, value in values.items():
            views[name].numpy()[...] = value
        return list(self.arena.send().values())


class L1OnDevice:
    """`L1` with its network on a device; the same `score`. Raises ValueError above `most_candidates`."""

    def __init__(self, model: L1, device: torch.device, most_candidates: int, record: Record = record_cuda_graph):
        self.user_features, self.note_features = model.user_features, model.note_features
        self._model = model
        self._network, self._weights_T = copy.deepcopy(model.network).to(device), model.weights_T.to(device)
        num_bytes = 4 * len(self.user_features) + 8 + most_candidates * 4 * len(self.note_features)
        self.ranker = _Ranker(self._scores, (False, False, True), num_bytes, device, record)
        if device.type == "cuda":
            user, notes = np.zeros(len(self.user_features)), np.zeros((1, len(self.note_features)))
            self.ranker.warm_up(user=user, surface=np.array([0]), notes=notes)

    def _scores(self, user_U: Tensor, surface_1: Tensor, note_NI: Tensor) -> Tensor:
        return self._network.utility(self._weights_T, user_U[None], surface_1, note_NI)

    def score(
        self, user: np.ndarray, notes: np.ndarray | Notes, *, surface: str | None = None, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """As `L1.score`; nothing is kept there, so the rows are not read."""
        picked = notes_of("l1", RankingRequest(user, notes), self.user_features, self.note_features).pick(self.note_features)
        return self.ranker(user=user, surface=np.array([self._model.code_of_surface(surface)]), notes=picked)

    def score_many(self, requests: Sequence[RankingRequest]) -> list[np.ndarray]:
        """As `L1.score_many`, one graph after the other."""
        return [self.score(request.user, request.notes, surface=request.surface) for request in requests]


class L2OnDevice:
    """`L2` with its network and note table on a device; the same `score`. Raises ValueError above `most_candidates`.

    history_type: of the layers over the history; by default bf16 on a GPU, which is what the fused layer takes there.
    """

    def __init__(
        self,
        model: L2,
        device: torch.device,
        most_candidates: int,
        record: Record = record_cuda_graph,
        history_type: torch.dtype | None = None,
    ):
        self.user_features, self.note_features, self.heads = model.user_features, model.note_features, model.heads
        self._model, self._length = model, model.history_length
        self._network = copy.deepcopy(model.network).to(device)
        self._network.history_layers.to(history_type or (torch.bfloat16 if device.type == "cuda" else torch.float32))
        # one column more says whether the id is known: 0 in the row for those that are not
        is_known = torch.ones(len(model.table_ND), 1)
        is_known[0] = 0.0
        ids = torch.from_numpy(_raw_ids(model.shape.words.note_ids))
        self._raw_id_of_code = np.append(EMPTY_ID, ids.numpy())  # that of unknown notes is in no table
        self._tables = build_tables([(ids, torch.cat([model.table_ND, is_known], dim=1))]).to(device)
        num_request = len(self.user_features) + len(model.shape.attributes)
        num_bytes = 4 * num_request + 8 * (1 + self._length) + most_candidates * (8 + 4 * len(self.note_features))
        self.ranker = _Ranker(self._probabilities, (False, False, False, False, True, True), num_bytes, device, record)
        if device.type == "cuda":
            user, notes = np.zeros(len(self.user_features)), np.zeros((1, len(self.note_features)))
            self.ranker.warm_up(**self._values(user, [], np.array([EMPTY_ID]), notes, None, None))

    def _probabilities(
        self, user_U: Tensor, surface_1: Tensor, attributes_A: Tensor, history_L: Tensor, note_N: Tensor, note_NI: Tensor
    ) -> Tensor:
        """float32 [N, heads]. history_L, note_N: raw ids."""
        ids = torch.cat([history_L, note_N])
        found = embedding_lookup(ids, torch.zeros_like(ids), self._tables)
        of_history, of_notes = found.split([len(history_L), len(note_N)])
        is_there_1L, history_1LD = of_history[None, :, -1] > 0, of_history[None, :, :-1]
        reader = self._network.read_places(user_U[None], surface_1, attributes_A[None], is_there_1L, history_1LD)
        logits_KNT = self._network.logits_of(reader, of_notes[None, :, :-1], note_NI[None])[:, 0]
        return torch.sigmoid(logits_KNT).mean(0)

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
        """As `L2.score`; nothing is kept there, so the rows are not read."""
        request = RankingRequest(user, notes, codes=codes)
        picked = notes_of("l2", request, self.user_features, self.note_features).pick(self.note_features)
        if codes is None and len(note_ids) != len(notes):
            raise ValueError(f"note_ids and notes must have one row per candidate, got {len(note_ids)} and {len(notes)}")
        raw_id_N = _raw_ids(note_ids) if codes is None else self._raw_id_of_code[codes]
        scores_NT = self.ranker(**self._values(user, history_note_ids, raw_id_N, picked, surface, user_attributes))
        return {head: scores_NT[:, column] for column, head in enumerate(self.heads)}

    def score_many(self, requests: Sequence[RankingRequest]) -> list[dict[str, np.ndarray]]:
        """As `L2.score_many`, one graph after the other."""
        return [
            self.score(
                request.user, request.history_note_ids, request.note_ids, request.notes,
                surface=request.surface, user_attributes=request.user_attributes, codes=request.codes,
            )
            for request in requests
        ]  # fmt: skip

    def _values(
        self,
        user: np.ndarray,
        history_note_ids: Sequence[str],
        raw_id_N: np.ndarray,
        notes: np.ndarray,
        surface: str | None,
        user_attributes: str | None,
    ) -> dict[str, np.ndarray]:
        history_L = np.full(self._length, EMPTY_ID, dtype=np.int64)
        newest = _raw_ids(history_note_ids[-self._length :])[::-1]
        history_L[: len(newest)] = newest
        return {
            "user": user,
            "surface": np.array([self._model.code_of_surface(surface)]),
            "attributes": self._model.encoded_attributes(user_attributes),
            "history": history_L,
            "note_ids": raw_id_N,
            "notes": notes,
        }


class VectorsOnDevice:
    """Exact search among the two-tower model's vectors. From four million on they are bf16 on a GPU, which its kernel takes."""

    def __init__(self, vectors_VD: np.ndarray, device: torch.device):
        large = device.type == "cuda" and len(vectors_VD) >= SMALLEST_PROBLEM
        self._vectors_VD = torch.tensor(vectors_VD, dtype=torch.bfloat16 if large else torch.float32, device=device)

    def best(self, user_D: np.ndarray, usable_V: np.ndarray, limit: int) -> np.ndarray:
        """int64 [at most limit]: rows of the usable vectors by their product with user_D, largest first, ties by row."""
        vectors = self._vectors_VD
        words = np.packbits(np.pad(~usable_V, (0, -len(usable_V) % 32)), bitorder="little").view(np.int32)
        query_1D = torch.from_numpy(user_D).to(vectors.device, vectors.dtype)[None]
        excluded_1W = torch.from_numpy(words).to(vectors.device)[None]
        rows = top_k(query_1D, vectors, min(limit, len(vectors)), excluded=excluded_1W)[1][0].cpu().numpy()
        return rows[rows >= 0]


def moved(
    models: dict[str, Any], vectors_VD: np.ndarray, device: torch.device, most_candidates: int
) -> tuple[dict[str, Any], VectorsOnDevice | None]:
    """The loaded models by name with L1 and L2 on the device, and the vectors there; as they are, and None, on a CPU."""
    if device.type == "cpu":
        return models, None
    rankers = {"l1": L1OnDevice(models["l1"], device, most_candidates), "l2": L2OnDevice(models["l2"], device, most_candidates)}
    return models | rankers, VectorsOnDevice(vectors_VD, device)
