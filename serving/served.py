"""What one request did: everything that the response, `/v1/explain` and the forward log say."""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serving import logs
from serving.hydrate import CandidateFeatures, UserFeatures
from serving.policy import Placed
from serving.request import Request, Steps
from serving.retrieve import Candidates


@dataclass(frozen=True)
class Served:
    """One answered request.

    Arrays are over the C candidates in order of recall; NaN where a stage did not score one. page: what took each place, first
    place first. logged: the candidates whose features are kept (all shown, and a sampled share of the rest).
    """

    request_id: str
    user_id: str
    feed_type: str
    t_us: int
    tick_us: int
    position: tuple[int, ...]
    declarations_hash: str
    model_versions: Mapping[str, str]
    steps: Steps
    user: UserFeatures
    candidates: Candidates
    l1_score_C: np.ndarray
    predictions: Mapping[str, np.ndarray]
    final_score_C: np.ndarray
    page: Sequence[Placed]
    logged: np.ndarray
    logged_features: CandidateFeatures

    @classmethod
    def of(cls, request: Request, request_id: str, **made: Any) -> "Served":
        """What `made` says, under the request's own reader, instants and versions."""
        world = request.world
        return cls(
            request_id=request_id,
            user_id=request.user_id,
            feed_type=request.feed_type,
            t_us=request.t_us,
            tick_us=request.view.tick_us,
            position=tuple(request.view.position),
            declarations_hash=world.declarations_hash,
            model_versions=world.models.versions,
            steps=request.steps,
            user=request.user,
            **made,
        )

    def impression_id(self, position: int) -> str:
        return f"{self.request_id}:{position}"

    def predictions_of(self, candidate: int) -> dict[str, float]:
        return {head: float(scores[candidate]) for head, scores in self.predictions.items() if np.isfinite(scores[candidate])}

    def as_row(self) -> dict[str, Any]:
        """The row of `lake.forward_log`; instants as microseconds, maps as dicts."""
        logged = {int(candidate): row for row, candidate in enumerate(self.logged)}
        position_of = {placed.candidate: position for position, placed in enumerate(self.page)}
        candidates = range(len(self.candidates))
        return {
            **self.head(),
            "candidates": [self._candidate(one, position_of.get(one), logged.get(one)) for one in candidates],
        }

    def head(self) -> dict[str, Any]:
        """The row without its candidates."""
        return {
            "request_id": self.request_id,
            "user_id": self.user_id,
            "feed_type": self.feed_type,
            "request_ts": self.t_us,
            "feature_watermark": self.tick_us,
            "known_position": list(self.position),
            "declarations_hash": self.declarations_hash,
            "model_versions": json.dumps(dict(self.model_versions)),
            "degraded": list(self.steps.degraded),
            "timings_ms": json.dumps(self.steps.timings_ms),
            "user_features": self.user.as_dict(),
            "user_sequences": dict(self.user.sequences),
            "user_maps": dict(self.user.maps),
        }

    def _candidate(self, candidate: int, position: int | None, logged: int | None) -> dict[str, Any]:
        placed = None if position is None else self.page[position]
        return {
            "impression_id": None if position is None else self.impression_id(position),
            "note_id": self.candidates.note_ids[candidate],
            "author_id": self.candidates.author_ids[candidate],
            "sources": list(self.candidates.sources_of(candidate)),
            "recall_score": finite(self.candidates.recall_score_C[candidate]),
            "l1_score": finite(self.l1_score_C[candidate]),
            "final_score": finite(self.final_score_C[candidate]),
            "position": position,
            "shown": placed is not None,
            "slot": None if placed is None else placed.slot,
            "propensity": None if placed is None else placed.propensity,
            "features": None if logged is None else self.logged_features.row(logged),
            "sequences": None if logged is None else self.logged_features.sequences_of(logged),
            "maps": None if logged is None else self.logged_features.maps_of(logged),
            "predictions": self.predictions_of(candidate),
        }


def new_request_id() -> str:
    """The id that the answer under way has in the logs; outside of HTTP another one at every call."""
    current = logs.request_id.get()
    return uuid.uuid4().hex if current == logs.NONE else current


def finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
