"""Which candidate adds most to a page: its relevance, and how little it is like what stands just before it.

Shape letters: S candidates, N of them asked about, D dimensions, W notes of the page that are looked back at. Knows nothing of
authors or rules.
"""

import math
from collections.abc import Callable

import numpy as np

Gains = Callable[[list[int], np.ndarray], np.ndarray]
"""(candidates on the page so far, first place first; those asked about [N]) → float64 [N], how much each would add next."""

_SPANNED = 1e-7
"""What a note adds, below which it adds nothing but rounding."""


def relevance_only(relevance_S: np.ndarray, vectors_SD: np.ndarray, strength: float, window: int) -> Gains:
    return lambda page, asked_N: relevance_S[asked_N]


def sliding_spectrum(relevance_S: np.ndarray, vectors_SD: np.ndarray, strength: float, window: int) -> Gains:
    """Sliding Spectrum Decomposition (Huang, Wang, Zhang, Xu: "Sliding Spectrum Decomposition for Diversified Recommendation",
    KDD 2021, arXiv 2107.05204): relevance + strength × the volume that the last W notes and this one span.

    vectors_SD: unit rows, or zeros where a note has none; such a note is taken to be like no other. The volume of the notes in
    the window is the product of what each adds to those before it; a candidate adds its residual against all of them. Both are
    worked out from cosines (Cholesky), as a window is short and its notes were on the page before.
    """
    vectors_SD = vectors_SD.astype(np.float64)
    cosines: dict[int, np.ndarray] = {}  # of a note of the page: [S]

    def gains(page: list[int], asked_N: np.ndarray) -> np.ndarray:
        seen = page[-(window - 1) :] if window > 1 else []
        for note in seen:
            if note not in cosines:
                cosines[note] = vectors_SD @ vectors_SD[note]
        seen = [note for note in seen if cosines[note][note]]  # those that have a vector
        if not seen:
            return relevance_S[asked_N] + strength
        cosine_WS = np.array([cosines[note] for note in seen])
        inverse_WW, volume = _inverse_cholesky(cosine_WS[:, seen].tolist())
        along_WN = np.array(inverse_WW) @ cosine_WS[:, asked_N]
        along_WN *= along_WN
        residual_N = np.sqrt(np.maximum(1.0 - along_WN.sum(axis=0), 0.0))
        return relevance_S[asked_N] + strength * volume * residual_N

    return gains


def _inverse_cholesky(gram_WW: list[list[float]]) -> tuple[list[list[float]], float]:
    """The inverse of the Cholesky factor, and its determinant: what W unit vectors with these cosines span. A vector in the
    span of those before it adds no direction, and makes the volume 0. In plain numbers, as W is 4 or so."""
    size = len(gram_WW)
    inverse, volume = [[0.0] * size for _ in range(size)], 1.0
    for row in range(size):
        along = [sum(inverse[k][m] * gram_WW[row][m] for m in range(k + 1)) for k in range(row)]
        adds = math.sqrt(max(gram_WW[row][row] - sum(share * share for share in along), 0.0))
        if adds < _SPANNED:
            return inverse, 0.0
        volume *= adds
        inverse[row][row] = 1.0 / adds
        for column in range(row):
            inverse[row][column] = -sum(along[k] * inverse[k][column] for k in range(column, row)) / adds
    return inverse, volume


def marginal_relevance(relevance_S: np.ndarray, vectors_SD: np.ndarray, strength: float, window: int) -> Gains:
    """Maximal Marginal Relevance (Carbonell and Goldstein, SIGIR 1998): relevance − strength × the largest cosine to one of the
    last W notes. vectors_SD: unit rows, or zeros, which are like nothing."""

    def gains(page: list[int], asked_N: np.ndarray) -> np.ndarray:
        seen = page[-window:] if window > 0 else []
        if not seen:
            return relevance_S[asked_N]
        return relevance_S[asked_N] - strength * np.clip((vectors_SD[asked_N] @ vectors_SD[seen].T).max(axis=1), 0.0, 1.0)

    return gains


METHODS = {"none": relevance_only, "ssd": sliding_spectrum, "mmr": marginal_relevance}


def as_relevance(scores_S: np.ndarray) -> np.ndarray:
    """float64 [S]: the scores on a scale from 0 to 1, so that one strength means the same on every page. Missing ones are 0."""
    finite = np.isfinite(scores_S)
    if not finite.any():
        return np.zeros(len(scores_S))
    low, high = scores_S[finite].min(), scores_S[finite].max()
    scaled_S = (scores_S - low) / (high - low) if high > low else np.ones(len(scores_S))
    return np.where(finite, scaled_S, 0.0)
