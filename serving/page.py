"""The last stage: what L2 has scored becomes a page, by the rules of the policy.

Shape letters: C candidates in order of recall, S survivors of L1, N notes of the catalogue, V vectors of notes, D dimensions.
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from random import Random

import numpy as np

from serving.placing import as_relevance
from serving.policy import COLD_START, PROMOTED, Placed, Pool, arrange_best
from serving.request import Request
from serving.retrieve import Candidates
from serving.settings import Settings
from serving.world import World
from warehouse.time_algebra import HOUR_US

log = logging.getLogger(__name__)


def allowed_notes(
    settings: Settings, note_ids: list[str], author_ids: list[str | None], topics: list[str | None]
) -> np.ndarray:
    """bool [N]: notes that the settings do not block, by their own id, their author or their topic."""
    notes, authors, blocked = set(settings.blocked_notes), set(settings.blocked_authors), set(settings.blocked_topics)
    return np.array(
        [
            note_id not in notes and author_id not in authors and topic not in blocked
            for note_id, author_id, topic in zip(note_ids, author_ids, topics, strict=True)
        ],
        dtype=bool,
    )


def reserve(request: Request, candidates: Candidates, l1_order_C: np.ndarray, top_k: int) -> np.ndarray:
    """int64 [S]: the top_k of L1, the last of them making room for notes that promoted and cold-start places want: L1 has
    nothing good to say of a note that nobody has seen."""
    survivors_S = l1_order_C[:top_k]
    slots = list(request.world.settings.rules.slots.values())
    if not slots or len(l1_order_C) <= top_k:
        return survivors_S
    wanted: list[int] = []
    row_C = candidates.row_C
    for slot, is_fit_C in ((PROMOTED, _promoted(request, row_C)), (COLD_START, _cold(request, row_C))):
        number = slots.count(slot)
        missing = number - int(is_fit_C[survivors_S].sum())
        wanted += [candidate for candidate in l1_order_C[top_k:].tolist() if is_fit_C[candidate]][: max(missing, 0)]
    wanted = list(dict.fromkeys(wanted))[:top_k]
    return np.concatenate([survivors_S[: top_k - len(wanted)], np.array(wanted, dtype=np.int64)]) if wanted else survivors_S


def lay_out(
    request: Request, candidates: Candidates, order_C: np.ndarray, score_C: np.ndarray, page_size: int, request_id: str
) -> list[Placed]:
    """The page, first place first; `candidate` is a place in `candidates`. What had to give way is added to `degraded`.

    order_C: candidates to choose from, best first. What is explored depends on the request's id alone, so that a page can be
    made again.
    """
    rules, relevance_S = request.world.settings.rules, as_relevance(score_C[order_C])

    def head_of(size: int) -> Pool:
        return _pool(request, candidates.row_C[order_C[:size]], relevance_S[:size])

    placed, relaxed = arrange_best(head_of, len(order_C), page_size, rules, Random(request_id))
    request.steps.degraded.extend(relaxed)
    return [Placed(int(order_C[item.candidate]), item.slot, item.propensity) for item in placed]


def _pool(request: Request, row_S: np.ndarray, relevance_S: np.ndarray) -> Pool:
    catalogue, slots = request.world.catalogue, request.world.settings.rules.slots.values()
    vectors_VD, vector_S = _vectors(request, row_S)
    return Pool(
        note_S=row_S,
        author_S=catalogue.author_row_N[row_S],
        topic_S=catalogue.topic_code_N[row_S],
        relevance_S=relevance_S,
        vectors_VD=vectors_VD,
        vector_S=vector_S,
        may_show_S=_may_show(request, row_S),
        is_promoted_S=_promoted(request, row_S),
        is_cold_S=_cold(request, row_S) if COLD_START in slots else np.zeros(len(row_S), dtype=bool),
    )


def showable(request: Request, seen: Sequence[str] = ()) -> AbstractContextManager[np.ndarray]:
    """Lends bool [N]: notes that exist at t and that neither the settings nor the reader's own `hide` forbid, short page or
    not; without those that are named as seen."""
    world = request.world
    rows = world.catalogue.rows([*world.readers.hidden(request.user_id), *seen])
    return world.showable.without(request.t_us, rows[rows >= 0])


def _may_show(request: Request, row_S: np.ndarray) -> np.ndarray:
    """bool [S]: `showable` at these rows."""
    world = request.world
    may_S = (world.catalogue.created_us_N[row_S] < request.t_us) & world.allowed_N[row_S]
    if hidden := list(world.readers.hidden(request.user_id)):
        may_S &= ~np.isin(row_S, world.catalogue.rows(hidden))
    return may_S


def _vectors(request: Request, row_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [V, D] that diversity compares, int64 [S] the vector of each row); none, and a word in `degraded`, where the
    vectors cannot be had."""
    if request.world.settings.diversity != "none":
        try:
            return request.world.models.note_vectors, request.world.models.vector_of_row[row_S]
        except Exception:  # costs the page its variety, never the page
            log.exception("no vectors of notes; the page is laid out without diversity")
            if "diversity" not in request.steps.degraded:
                request.steps.degraded.append("diversity")
    return np.empty((0, 1), np.float32), np.full(len(row_S), -1)


def _promoted(request: Request, row_S: np.ndarray) -> np.ndarray:
    """bool [S]: notes that the settings promote."""
    promoted = request.world.settings.promoted_notes
    if not promoted:
        return np.zeros(len(row_S), dtype=bool)
    return np.isin(row_S, request.world.catalogue.rows(promoted))


def _cold(request: Request, row_S: np.ndarray) -> np.ndarray:
    """bool [S]: notes made, or first seen, within the hours of a cold start."""
    world: World = request.world
    since_us = request.t_us - round(world.settings.cold_start_hours * HOUR_US)
    return world.catalogue.freshness_us[row_S] >= since_us
