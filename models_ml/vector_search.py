"""Ways to search among vectors of notes, and what each finds of what an exact search in fp32 does.

V vectors, Q queries, D width. Source of the graph: Malkov and Yashunin, arXiv 1603.09320, as usearch builds it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from usearch.index import Index

CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH = 16, 64, 256
OVERFETCH = 2
"""Times the wanted number that a graph is asked for; the exact products decide among those."""
MOST_VECTORS, MOST_QUERIES = 100_000, 500


def graph_of(vectors_VD: np.ndarray, kind: str = "bf16") -> Index:
    """Neighbours by product over float32 unit rows, held as `kind`: bf16 or i8. Built by one thread: concurrent additions have
    lost vectors (usearch#735)."""
    graph = Index(
        ndim=vectors_VD.shape[1],
        metric="ip",
        dtype=kind,
        connectivity=CONNECTIVITY,
        expansion_add=EXPANSION_ADD,
        expansion_search=EXPANSION_SEARCH,
    )
    graph.add(np.arange(len(vectors_VD)), vectors_VD, threads=1)
    return graph


def recall_of_indexes(vectors_VD: np.ndarray, queries_QD: np.ndarray, ks: Sequence[int]) -> dict[str, dict[str, float]]:
    """Index -> `recall@k` -> share of the k largest products in fp32 that it finds, over the queries; ks above V are left out.

    `exact bf16` and `exact int8` take every product of rounded vectors and leave it at that; the graphs are asked for OVERFETCH
    times k, of which the largest products in fp32 count, as when serving. Evenly spaced ones of more than MOST_VECTORS vectors
    and MOST_QUERIES queries stand for all.
    """
    vectors_VD, queries_QD = _spaced(vectors_VD, MOST_VECTORS), _spaced(queries_QD, MOST_QUERIES)
    ks = [k for k in ks if k <= len(vectors_VD)]
    if not ks or not len(queries_QD):
        return {}
    products_QV = queries_QD @ vectors_VD.T
    order_QK = _largest(products_QV, max(ks))
    found = {
        "exact bf16": _largest(_bf16(queries_QD) @ _bf16(vectors_VD).T, max(ks)),
        "exact int8": _largest(_int8(queries_QD) @ _int8(vectors_VD).T, max(ks)),
    }
    report = {name: {f"recall@{k}": _mean_share(rows[:, :k], order_QK[:, :k]) for k in ks} for name, rows in found.items()}
    for name, kind in (("HNSW bf16", "bf16"), ("HNSW int8", "i8")):
        graph = graph_of(vectors_VD, kind)
        report[name] = {}
        for k in ks:
            asked = min(OVERFETCH * k, len(vectors_VD))
            rows = [graph.search(query_D, asked).keys.astype(np.int64) for query_D in queries_QD]
            best = [
                own[np.argsort(-product_V[own], kind="stable")[:k]] for own, product_V in zip(rows, products_QV, strict=True)
            ]
            report[name][f"recall@{k}"] = _mean_share(best, order_QK[:, :k])
    return report


def _spaced(rows: np.ndarray, most: int) -> np.ndarray:
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


def _largest(products_QV: np.ndarray, most: int) -> np.ndarray:
    return np.argsort(-products_QV, axis=1, kind="stable")[:, :most]


def _bf16(rows: np.ndarray) -> np.ndarray:
    return torch.from_numpy(rows).bfloat16().float().numpy()


def _int8(rows: np.ndarray) -> np.ndarray:
    """Each row by a scale of its own, as whole numbers in [-127, 127]; the scale of a vector comes back into its products."""
    scale = np.abs(rows).max(axis=1, keepdims=True) / 127
    return np.rint(rows / np.maximum(scale, 1e-12)) * scale


def _mean_share(own: Sequence[np.ndarray] | np.ndarray, exact_QK: np.ndarray) -> float:
    shared = [len(np.intersect1d(rows, exact_K)) for rows, exact_K in zip(own, exact_QK, strict=True)]
    return float(np.mean(shared) / exact_QK.shape[1])
