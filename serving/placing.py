"""The places of a page, one after the other, as one compiled loop: caps, reach, variety, kept places.

Shape letters: S candidates, best first; P places; V vectors, D dimensions; R notes of the page that are looked back at. Knows
nothing of chance: the loop stops before a place whose note is drawn, until it is told which. All that `fill` calls stands in
this file, because numba's cache of it looks at no other.
"""

import numpy as np
from numba import njit, types

from warehouse.compiled import compiled, only_read

SLOTS = ("ranked", "promoted", "cold_start", "exploration")
"""What a place may be kept for; the first is what it is otherwise."""
CAPS = ("author", "topic")
METHODS = ("none", "ssd", "mmr")
"""How the variety of a note counts:

ssd: Sliding Spectrum Decomposition (Huang, Wang, Zhang, Xu: "Sliding Spectrum Decomposition for Diversified Recommendation",
KDD 2021, arXiv 2107.05204): relevance + strength × the volume that the last `window` − 1 notes and this one span. The volume of
the notes before is the product of what each adds to those before it, and this one adds its residual against all of them; both
are worked out from cosines (Cholesky).
mmr: Maximal Marginal Relevance (Carbonell and Goldstein, SIGIR 1998): relevance − strength × the largest cosine, 0 to 1, to one
of the last `window` notes.

A note without a vector is like no other.
"""
_RANKED, _PROMOTED, _COLD_START, _EXPLORATION = range(4)
_AUTHOR, _TOPIC = range(2)
_NONE, _SSD, _MMR = range(3)
_SPANNED = 1e-7
"""What a note adds, below which it adds nothing but rounding."""


_INTS, _FLOATS, _MASK = only_read(types.int64), only_read(types.float64), only_read(types.boolean)


@compiled(types.float64[::1](_FLOATS))
def as_relevance(scores_S):
    """float64 [S]: the scores on a scale from 0 to 1, so that one strength means the same on every page. Missing ones are 0."""
    low, high = np.inf, -np.inf
    for score in scores_S:
        if np.isfinite(score):
            low, high = min(low, score), max(high, score)
    relevance_S = np.zeros(len(scores_S))
    for place, score in enumerate(scores_S):
        if np.isfinite(score):
            relevance_S[place] = (score - low) / (high - low) if high > low else 1.0
    return relevance_S


@njit
def _left_at_first(note_S, may_show_S):
    """bool [S]: what may be shown, each note where it comes first."""
    size = 8
    while size < 2 * len(note_S):
        size *= 2
    place_H = np.full(size, -1)  # by the number's hash
    left_S = np.empty(len(note_S), np.bool_)
    for s in range(len(note_S)):
        at = (note_S[s] * 0x9E3779B1) & (size - 1)
        while place_H[at] >= 0 and note_S[place_H[at]] != note_S[s]:
            at = (at + 1) & (size - 1)
        left_S[s] = may_show_S[s] and place_H[at] < 0
        if place_H[at] < 0:
            place_H[at] = s
    return left_S


@njit
def _allow(left_S, author_full_S, topic_full_S, allowed_S, relaxed):
    """Writes into allowed_S what may take the next place; returns the first of them, -1 where nothing is left. Where the caps
    leave nothing, the topics' gives way, then the authors'."""
    for author_cap, topic_cap in ((True, True), (True, False), (False, True), (False, False)):
        first = -1
        for s in range(len(left_S) - 1, -1, -1):
            allowed_S[s] = left_S[s] and not (author_cap and author_full_S[s]) and not (topic_cap and topic_full_S[s])
            if allowed_S[s]:
                first = s
        if first >= 0:
            if not author_cap:
                _relax(relaxed, _AUTHOR)
            if not topic_cap:
                _relax(relaxed, _TOPIC)
            return first
    return -1


@njit
def _relax(relaxed, cap):
    if relaxed[0] < 0:
        relaxed[0] = cap
    elif relaxed[0] != cap:
        relaxed[1] = cap


@njit
def _first(allowed_S, wanted_S):
    """The first that is both, -1 where none is."""
    for s in range(len(allowed_S)):
        if allowed_S[s] and wanted_S[s]:
            return s
    return -1


@njit
def _close(full_S, code_S, cap, chosen_P, place):
    """Marks all candidates of the last note's author, or topic, once as many as its cap allows stand on the page."""
    code, number = code_S[chosen_P[place]], 0
    for p in range(place + 1):
        number += code_S[chosen_P[p]] == code
    if cap > 0 and code >= 0 and number >= cap:
        for s in range(len(code_S)):
            full_S[s] = full_S[s] or code_S[s] == code


@njit
def _cosine(vectors_VD, one, other):
    """Of two rows of unit length; 0 where one of them is -1."""
    total = 0.0
    if one >= 0 and other >= 0:
        for d in range(vectors_VD.shape[1]):
            total += np.float64(vectors_VD[one, d]) * np.float64(vectors_VD[other, d])
    return total


@compiled(types.float64(only_read(types.float64, 2), types.float64[:, ::1]))
def invert_cholesky(gram_RR, inverse_RR):
    """Writes the inverse of the Cholesky factor; returns its determinant, what R unit vectors with these cosines (of them the
    lower half is read) span. A vector in the span of those before it adds no direction, and makes the volume 0."""
    size, volume = len(gram_RR), 1.0
    along_R = np.empty(size)
    inverse_RR[:] = 0.0
    for row in range(size):
        squares = 0.0
        for k in range(row):
            along_R[k] = 0.0
            for m in range(k + 1):
                along_R[k] += inverse_RR[k, m] * gram_RR[row, m]
            squares += along_R[k] * along_R[k]
        adds = np.sqrt(max(gram_RR[row, row] - squares, 0.0))
        if adds < _SPANNED:
            return 0.0
        volume *= adds
        inverse_RR[row, row] = 1.0 / adds
        for column in range(row):
            total = 0.0
            for k in range(column, row):
                total += along_R[k] * inverse_RR[k, column]
            inverse_RR[row, column] = -total / adds
    return volume


@njit
def _residual(inverse_RR, cosine_RS, row_R, s):
    """The length of what candidate s adds to the notes whose cosines stand in row_R."""
    squares = 0.0
    for r in range(len(row_R)):
        along = 0.0
        for m in range(r + 1):
            along += inverse_RR[r, m] * cosine_RS[row_R[m], s]
        squares += along * along
    return np.sqrt(max(1.0 - squares, 0.0))


@njit
def _largest_cosine(cosine_RS, row_R, s):
    most = 0.0
    for row in row_R:
        most = max(most, cosine_RS[row, s])
    return min(most, 1.0)


@njit
def _span(cosine_RS, seen_R, row_R):
    """(the inverse of the Cholesky factor of the notes of seen_R, whose cosines stand in the rows row_R; their volume)."""
    gram_RR, inverse_RR = np.empty((len(seen_R), len(seen_R))), np.empty((len(seen_R), len(seen_R)))
    for r in range(len(seen_R)):
        for m in range(r + 1):
            gram_RR[r, m] = cosine_RS[row_R[r], seen_R[m]]
    return inverse_RR, invert_cholesky(gram_RR, inverse_RR)


@njit
def _adds_most(method, strength, relevance_S, cosine_RS, seen_R, row_R, allowed_S, rank_S, best, last_rank):
    """Of the allowed candidates from `best` on, up to a rank, the one that adds most after the notes of seen_R, whose cosines
    stand in the rows row_R; `best` where there is none."""
    inverse_RR, volume = _span(cosine_RS, seen_R, row_R)
    chosen, most = best, -np.inf
    for s in range(best, len(allowed_S)):
        if rank_S[s] > last_rank:
            break
        if allowed_S[s]:
            gain = relevance_S[s]
            if method == _SSD:
                gain += strength * volume * _residual(inverse_RR, cosine_RS, row_R, s)
            elif method == _MMR:
                gain -= strength * _largest_cosine(cosine_RS, row_R, s)
            if gain > most:
                chosen, most = s, gain
    return chosen


_POOL = (_INTS, _INTS, _INTS, _FLOATS, only_read(types.float32, 2), _INTS, _MASK, _MASK, _MASK)
_RULES = (_INTS, _INTS, types.int64, types.int64, types.int64, types.float64, types.int64, types.int64)
_FILLED = types.Tuple((types.int64, types.int64[::1], types.int64[::1], types.int64[::1], types.int64, types.boolean[::1]))


@compiled(_FILLED(*_POOL, *_RULES))
def fill(
    note_S,
    author_S,
    topic_S,
    relevance_S,
    vectors_VD,
    vector_S,
    may_show_S,
    is_promoted_S,
    is_cold_S,
    kept_P,
    drawn_P,
    author_cap,
    topic_cap,
    method,
    strength,
    window,
    reach,
):
    """(the number of places filled; the candidate of each, first place first; the slot that put it there; the caps that gave
    way, in that order, -1 for none; where it stopped before a place whose note is drawn, the candidate that ranks first there,
    else -1; bool [S], what it is drawn from). Slots, caps and methods are numbers: their places in SLOTS, CAPS and METHODS.

    note_S to is_cold_S: the candidates, as in `policy.Pool`. kept_P: the slot of each place. drawn_P: what was drawn for a
    place of exploration, -1 where that is not known yet. author_cap to reach: as in `policy.Rules`.
    """
    num_candidates, size = len(note_S), len(kept_P)
    left_S = _left_at_first(note_S, may_show_S)
    rank_S, rank = np.empty(num_candidates, np.int64), -1
    for s in range(num_candidates):
        rank += left_S[s]
        rank_S[s] = rank
    allowed_S = np.empty(num_candidates, np.bool_)
    author_full_S, topic_full_S = np.zeros(num_candidates, np.bool_), np.zeros(num_candidates, np.bool_)
    chosen_P, slot_P, relaxed = np.empty(size, np.int64), np.empty(size, np.int64), np.full(2, -1)
    looked_back = max(window - 1 if method == _SSD else window if method == _MMR else 0, 0)
    num_rows = max(min(looked_back, size), 1)
    cosine_RS = np.empty((num_rows, num_candidates))  # of the note at place p, in row p % num_rows
    seen_R, row_R = np.empty(num_rows, np.int64), np.empty(num_rows, np.int64)

    for place in range(size):
        best = _allow(left_S, author_full_S, topic_full_S, allowed_S, relaxed)
        if best < 0:
            return place, chosen_P, slot_P, relaxed, -1, allowed_S
        kept, candidate = kept_P[place], -1
        if kept == _PROMOTED:
            candidate = _first(allowed_S, is_promoted_S)
        elif kept == _COLD_START:
            candidate = _first(allowed_S, is_cold_S)
        elif kept == _EXPLORATION:
            candidate = drawn_P[place]
        slot_P[place] = kept if candidate >= 0 else _RANKED
        if candidate < 0:
            candidate = best
            if rank_S[best] + reach > place:  # else it has waited as long as it may
                num_seen = 0
                for before in range(max(place - looked_back, 0), place):
                    row, seen = before % num_rows, chosen_P[before]
                    if cosine_RS[row, seen] != 0.0:  # it has a vector
                        seen_R[num_seen], row_R[num_seen] = seen, row
                        num_seen += 1
                candidate = _adds_most(
                    *(method, strength, relevance_S, cosine_RS, seen_R[:num_seen], row_R[:num_seen]),
                    *(allowed_S, rank_S, best, place + reach),
                )
            if kept == _EXPLORATION:
                return place, chosen_P, slot_P, relaxed, candidate, allowed_S
        chosen_P[place] = candidate
        left_S[candidate] = False
        _close(author_full_S, author_S, author_cap, chosen_P, place)
        _close(topic_full_S, topic_S, topic_cap, chosen_P, place)
        if looked_back > 0:
            row = place % num_rows
            for before in range(max(place - looked_back, 0), place + 1):
                seen = chosen_P[before]
                cosine_RS[row, seen] = _cosine(vectors_VD, vector_S[candidate], vector_S[seen])
            for s in range(num_candidates):
                if rank_S[s] > place + looked_back + reach:  # will not be compared with it
                    break
                if left_S[s]:
                    cosine_RS[row, s] = _cosine(vectors_VD, vector_S[candidate], vector_S[s])
    return size, chosen_P, slot_P, relaxed, -1, allowed_S
