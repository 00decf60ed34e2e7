"""What was served, as the words of the wire (camelCase). Knows nothing of HTTP."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from math import isfinite
from typing import Any

import numpy as np
import orjson

from serving.catalogue import Catalogue
from serving.explain import stage_reached
from serving.retrieve import Candidates
from serving.served import Served, finite
from serving.wire import Note

_EPOCH = datetime(1970, 1, 1)


def instant(t_us: int | None) -> str | None:
    """Microseconds → `2022-05-05T16:10:00.000000Z`."""
    if t_us is None:
        return None
    return (_EPOCH + timedelta(microseconds=t_us)).isoformat(timespec="microseconds") + "Z"


def feed_answer(served: Served, catalogue: Catalogue) -> dict[str, Any]:
    candidates = served.candidates
    shown = np.array([placed.candidate for placed in served.page], dtype=np.int64)
    by_head = [(head, scores_C[shown].tolist()) for head, scores_C in served.predictions.items()]
    columns = candidates.row_C, candidates.recall_score_C, served.l1_score_C, served.final_score_C
    at_place = zip(served.page, candidates.sources_at(shown), *(values_C[shown].tolist() for values_C in columns), strict=True)
    notes = [
        {
            "position": position,
            "noteId": catalogue.note_ids[row],
            "authorId": catalogue.author_ids[row],
            "topic": catalogue.topics[row],
            "impressionId": served.impression_id(position),
            "source": sources[0],
            "sources": sources,
            "recallScore": recall_score,
            "l1Score": l1_score,
            "predictions": {head: scores[position] for head, scores in by_head if isfinite(scores[position])},
            "finalScore": final_score,
            "slot": placed.slot,
            "propensity": placed.propensity,
        }
        for position, (placed, sources, row, recall_score, l1_score, final_score) in enumerate(at_place)
    ]
    return {
        "requestId": served.request_id,
        "modelVersion": served.model_versions["l2"],
        "modelVersions": dict(served.model_versions),
        "requestTs": instant(served.t_us),
        "featureWatermark": instant(served.tick_us),
        "knownPosition": list(served.position),
        "notes": notes,
        "degraded": served.steps.degraded,
        "cached": served.steps.cached,
        "numCandidates": len(candidates),
        "timings": served.steps.timings_ms,
    }


def retrieved_answer(candidates: Candidates, catalogue: Catalogue) -> list[dict[str, Any]]:
    return [
        {
            "noteId": note_id,
            "authorId": author_id,
            "recallScore": float(score),
            "source": sources[0],
            "sources": list(sources),
            "topic": catalogue.topic_of(note_id),
        }
        for note_id, author_id, sources, score in zip(
            candidates.note_ids, candidates.author_ids, candidates.sources, candidates.recall_score_C, strict=True
        )
    ]


def l1_answer(
    notes: Sequence[Note], author_ids: Sequence[str | None], scores: np.ndarray, order: np.ndarray
) -> list[dict[str, Any]]:
    return [
        {**_carried(notes[row], author_ids[row]), "l1Score": finite(scores[row]), "position": position}
        for position, row in enumerate(order.tolist())
    ]


def l2_answer(
    notes: Sequence[Note],
    author_ids: Sequence[str | None],
    predictions: Mapping[str, np.ndarray],
    scores: np.ndarray,
    order: np.ndarray,
) -> list[dict[str, Any]]:
    return [
        {
            **_carried(notes[row], author_ids[row]),
            "l1Score": notes[row].l1_score,
            "predictions": {head: float(values[row]) for head, values in predictions.items()},
            "finalScore": finite(scores[row]),
            "position": position,
        }
        for position, row in enumerate(order.tolist())
    ]


def _carried(note: Note, author_id: str | None) -> dict[str, Any]:
    return {
        "noteId": note.note_id,
        "authorId": author_id,
        "recallScore": note.recall_score,
        "source": note.source or (note.sources[0] if note.sources else None),
        "sources": note.sources,
    }


def explain_answer(row: Mapping[str, Any], note_id: str | None) -> dict[str, Any] | None:
    """One request, and all of its candidates or the one asked for; None if it was no candidate."""
    candidates = [candidate for candidate in row["candidates"] if note_id is None or candidate["note_id"] == note_id]
    if note_id is not None and not candidates:
        return None
    return {
        "requestId": row["request_id"],
        "userId": row["user_id"],
        "feedType": row["feed_type"],
        "requestTs": instant(row["request_ts"]),
        "featureWatermark": instant(row["feature_watermark"]),
        "knownPosition": row["known_position"],
        "declarationsHash": row["declarations_hash"],
        "modelVersions": orjson.loads(row["model_versions"]),
        "degraded": row["degraded"],
        "timings": orjson.loads(row["timings_ms"]),
        "userFeatures": row["user_features"],
        "userSequences": row["user_sequences"],
        "userMaps": row["user_maps"] or {},
        "candidates": [
            {
                "noteId": candidate["note_id"],
                "authorId": candidate["author_id"],
                "impressionId": candidate["impression_id"],
                "sources": candidate["sources"],
                "recallScore": candidate["recall_score"],
                "l1Score": candidate["l1_score"],
                "predictions": candidate["predictions"],
                "finalScore": candidate["final_score"],
                "position": candidate["position"],
                "slot": candidate["slot"],
                "propensity": candidate["propensity"],
                "stageReached": stage_reached(candidate),
                "features": candidate["features"],
                "sequences": candidate["sequences"],
                "maps": candidate["maps"],
            }
            for candidate in candidates
        ],
    }
