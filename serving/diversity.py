"""Which candidate adds most to a page: its relevance, and how little it is like what stands just before it.

Shape letters: S candidates, N of them asked about, D dimensions, W notes of the page that are looked back at. Knows nothing of
authors or rules.
"""

from collections.abc import Callable

import numpy as np

Gains = Callable[[list[int], np.ndarray], np.ndarray]
"""(candidates on the page so far, first place first; those asked about [N]) → float64 [N], how much each would add next."""


def relevance_only(relevance_S: np.ndarray, vectors_SD: np.ndarray, strength: float, window: int) -> Gains:
    return lambda page, asked_N: relevance_S[asked_N]


def sliding_spectrum(relevance_S: np.ndarray, vectors_SD: np.ndarray, strength: float, window: int) -> Gains:
    """Sliding Spectrum Decomposition (Huang, Wang, Zhang, Xu: "Sliding Spectrum Decomposition for Diversified Recommendation",
    KDD 2021, arXiv 2107.05204): relevance + strength × the volume that the last W notes and this one span.

    vectors_SD: unit rows, or zeros where a note has none; such a note is taken to be like no other. The volume of the notes in
    the window is the product of what each adds to those before it; a candidate adds its residual against all of them.
    """
    is_known_S = (vectors_SD != 0).any(axis=1)

    def gains(page: list[int], asked_N: np.ndarray) -> np.ndarray:
        seen = [place for place in page[-(window - 1) :] if is_known_S[place]] if window > 1 else []
        if not seen:
            return relevance_S[asked_N] + strength
        basis_DW, triangle_WW = np.linalg.qr(vectors_SD[seen].T)
        volume = float(np.abs(np.diag(triangle_WW)).prod())
        along_NW = vectors_SD[asked_N] @ basis_DW
        residual_N = np.sqrt(np.clip(1.0 - (along_NW**2).sum(axis=1), 0.0, 1.0))
        return relevance_S[asked_N] + strength * volume * np.where(is_known_S[asked_N], residual_N, 1.0)

    return gains


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
