"""Ranking and probability metrics on plain arrays; `bootstrap` has their intervals.

Ties, by rule: AUC counts a tied positive-negative pair as half; nDCG gives every row of a tied group the mean discount of the
places the group takes (the expectation over random orders); PR-AUC lets tied rows in together; MRR, MAP@k and recall@k put a
negative before a positive of the same score. So no metric depends on the order of the rows, but for the edges of ECE's bins.
R rows; labels are 0 or 1. Sources: Fawcett 2006 (AUC); He et al., ADKDD 2014 (NCE); McSherry & Najork, ECIR 2008 (tied nDCG);
Zhu et al., KDD 2017 (grouped AUC). `metrics_sql` is the same in SQL.
"""

import numpy as np

BINS = 15
_SMALLEST_PROBABILITY = 1e-7


def auc(labels_R: np.ndarray, scores_R: np.ndarray, weights_R: np.ndarray | None = None) -> float:
    """Chance that a positive row scores above a negative one, ties counting half; NaN unless both classes have weight.

    weights_R: how often each row counts (>= 0); None counts each once.
    """
    _check_same_length(labels_R, scores_R)
    weights_R = np.ones(len(labels_R)) if weights_R is None else np.asarray(weights_R, dtype=np.float64)
    distinct, group_R = np.unique(scores_R, return_inverse=True)
    positives_G = np.bincount(group_R, weights_R * labels_R, minlength=len(distinct))
    negatives_G = np.bincount(group_R, weights_R * (1 - np.asarray(labels_R)), minlength=len(distinct))
    return auc_of_ties(positives_G, negatives_G)


def auc_of_ties(positives_G: np.ndarray, negatives_G: np.ndarray) -> float:
    """`auc` of groups of tied rows, by ascending score."""
    pairs = positives_G.sum() * negatives_G.sum()
    if pairs == 0:
        return float("nan")
    negatives_below_G = np.cumsum(negatives_G) - negatives_G
    return float((positives_G * (negatives_below_G + negatives_G / 2)).sum() / pairs)


def log_loss(labels_R: np.ndarray, probabilities_R: np.ndarray) -> float:
    """Mean cross entropy in nats. Probabilities are clipped to [1e-7, 1 - 1e-7]: one sure mistake costs 16.1, not infinity."""
    return float(np.mean(losses(labels_R, probabilities_R)))


def losses(labels_R: np.ndarray, probabilities_R: np.ndarray) -> np.ndarray:
    """float64 [R]: each row's share of `log_loss`."""
    _check_same_length(labels_R, probabilities_R)
    clipped_R = np.clip(np.asarray(probabilities_R, dtype=np.float64), _SMALLEST_PROBABILITY, 1 - _SMALLEST_PROBABILITY)
    return -np.where(np.asarray(labels_R) == 1, np.log(clipped_R), np.log1p(-clipped_R))


def normalised_cross_entropy(labels_R: np.ndarray, probabilities_R: np.ndarray, base_rate: float) -> float:
    """1 - CE(model) / CE(always answering base_rate): 1 is perfect, 0 is no better, below 0 is worse.

    base_rate: the positive share of the *training* rows, which is what a model without features would answer.
    """
    baseline = log_loss(labels_R, np.full(len(labels_R), base_rate))
    return 1.0 - log_loss(labels_R, probabilities_R) / baseline


def expected_calibration_error(labels_R: np.ndarray, probabilities_R: np.ndarray, num_bins: int = BINS) -> float:
    """Mean gap between predicted and observed rate over `num_bins` bins of equal row count, weighted by rows."""
    predicted_N, observed_N, rows_N = reliability(labels_R, probabilities_R, num_bins).T
    return float((np.abs(predicted_N - observed_N) * rows_N).sum() / rows_N.sum())


def ndcg(labels_R: np.ndarray, scores_R: np.ndarray, groups_R: np.ndarray, k: int) -> float:
    """Mean over groups of DCG@k / ideal DCG@k with gain 1 per positive row and discount 1 / log2(1 + place).

    groups_R: any hashable-by-numpy key (user or request). Groups with no positive row have no ideal and are left out; NaN if
    none is left.
    """
    return _mean_of_defined(ndcg_of_groups(labels_R, scores_R, groups_R, k))


def ndcg_of_groups(labels_R: np.ndarray, scores_R: np.ndarray, groups_R: np.ndarray, k: int) -> np.ndarray:
    """float64 [G], groups ascending: `ndcg` of each, NaN without a positive row."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    _check_same_length(labels_R, scores_R)
    _check_same_length(labels_R, groups_R)
    labels_R = np.asarray(labels_R, dtype=np.float64)
    _, group_R = np.unique(groups_R, return_inverse=True)
    order_R = np.lexsort((-np.asarray(scores_R), group_R))
    group_R, labels_R, scores_R = group_R[order_R], labels_R[order_R], np.asarray(scores_R)[order_R]
    starts_G = np.flatnonzero(np.r_[True, group_R[1:] != group_R[:-1]]) if len(group_R) else np.zeros(0, dtype=int)
    if len(starts_G) == 0:
        return np.zeros(0)
    size_G = np.diff(np.r_[starts_G, len(group_R)])
    place_R = np.arange(len(group_R)) - np.repeat(starts_G, size_G) + 1
    discount_R = np.where(place_R <= k, 1 / np.log2(1 + place_R), 0.0)
    opens_tie_R = np.r_[True, (group_R[1:] != group_R[:-1]) | (scores_R[1:] != scores_R[:-1])]
    tie_R = np.cumsum(opens_tie_R) - 1
    mean_discount_R = (np.bincount(tie_R, discount_R) / np.bincount(tie_R))[tie_R]
    dcg_G = np.add.reduceat(labels_R * mean_discount_R, starts_G)
    positives_G = np.add.reduceat(labels_R, starts_G).astype(int)
    ideal_by_count = np.r_[0.0, np.cumsum(1 / np.log2(1 + np.arange(1, k + 1)))]
    ideal_G = ideal_by_count[np.minimum(positives_G, k)]
    return np.where(ideal_G > 0, dcg_G / np.where(ideal_G > 0, ideal_G, 1.0), np.nan)


def grouped_auc(labels_R: np.ndarray, scores_R: np.ndarray, groups_R: np.ndarray) -> float:
    """Mean of the groups' AUC, each weighted by its rows; groups without both classes are left out; NaN if none is left."""
    auc_G = auc_of_groups(labels_R, scores_R, groups_R)
    size_G, both_G = np.unique(groups_R, return_counts=True)[1], ~np.isnan(auc_G)
    return float(np.average(auc_G[both_G], weights=size_G[both_G])) if both_G.any() else float("nan")


def auc_of_groups(labels_R: np.ndarray, scores_R: np.ndarray, groups_R: np.ndarray) -> np.ndarray:
    """float64 [G], groups ascending: `auc` of each, NaN without both classes."""
    _check_same_length(labels_R, groups_R)
    labels_R, (_, group_R) = np.asarray(labels_R, dtype=np.float64), np.unique(groups_R, return_inverse=True)
    _, score_R = np.unique(scores_R, return_inverse=True)
    order_R = np.lexsort((score_R, group_R))
    group_R, score_R, labels_R = group_R[order_R], score_R[order_R], labels_R[order_R]
    num_groups = int(group_R.max(initial=-1)) + 1
    size_G, positives_G = np.bincount(group_R, minlength=num_groups), np.bincount(group_R, labels_R, num_groups)
    opens_tie_R = np.r_[True, (group_R[1:] != group_R[:-1]) | (score_R[1:] != score_R[:-1])][: len(group_R)]
    tie_R = np.cumsum(opens_tie_R) - 1
    negatives_T = np.bincount(tie_R, 1 - labels_R)
    group_T = group_R[opens_tie_R]
    negatives_before_G = np.r_[0.0, np.cumsum(size_G - positives_G)[:-1]]
    below_T = np.cumsum(negatives_T) - negatives_T - negatives_before_G[group_T]
    won_T = np.bincount(tie_R, labels_R) * (below_T + negatives_T / 2)
    pairs_G = positives_G * (size_G - positives_G)
    won_G = np.bincount(group_T, won_T, num_groups)
    return np.where(pairs_G > 0, won_G / np.where(pairs_G > 0, pairs_G, 1), np.nan)


def average_precision(labels_R: np.ndarray, scores_R: np.ndarray) -> float:
    """PR-AUC as the sum over thresholds of precision times the recall gained; NaN without a positive row."""
    _check_same_length(labels_R, scores_R)
    _, tie_R = np.unique(-np.asarray(scores_R, dtype=np.float64), return_inverse=True)
    return average_precision_of_ties(np.bincount(tie_R, labels_R), np.bincount(tie_R))


def average_precision_of_ties(positives_T: np.ndarray, rows_T: np.ndarray) -> float:
    """`average_precision` of groups of tied rows, by descending score."""
    if positives_T.sum() == 0:
        return float("nan")
    precision_T = np.cumsum(positives_T) / np.maximum(np.cumsum(rows_T), 1)
    return float((positives_T * precision_T).sum() / positives_T.sum())


def ranked_lists(labels_R: np.ndarray, scores_R: np.ndarray, groups_R: np.ndarray, k: int) -> dict[str, float]:
    """`mrr`, `map@k` and `recall@k`: means over the groups with a positive row; NaN if there is none.

    MRR looks at the whole list. MAP@k divides by min(positives, k), recall@k by all positives.
    """
    of_groups = lists_of_groups(labels_R, scores_R, groups_R, k)
    return {name: _mean_of_defined(value_G) for name, value_G in of_groups.items()}


def lists_of_groups(labels_R: np.ndarray, scores_R: np.ndarray, groups_R: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """float64 [G], groups ascending: the metrics of `ranked_lists` of each, NaN without a positive row."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    _check_same_length(labels_R, scores_R)
    _check_same_length(labels_R, groups_R)
    _, group_R = np.unique(groups_R, return_inverse=True)
    labels_R = np.asarray(labels_R, dtype=np.float64)
    order_R = np.lexsort((labels_R, -np.asarray(scores_R, dtype=np.float64), group_R))
    group_R, labels_R = group_R[order_R], labels_R[order_R]
    positives_G = np.bincount(group_R, labels_R)
    size_G = np.bincount(group_R)
    starts_G = np.cumsum(size_G) - size_G
    place_R = np.arange(len(group_R)) - starts_G[group_R] + 1
    found_before_G = np.r_[0.0, np.cumsum(positives_G)[:-1]] if len(positives_G) else positives_G
    precision_R = (np.cumsum(labels_R) - found_before_G[group_R]) / place_R
    within_R = labels_R * (place_R <= k)
    asked_G = np.where(positives_G > 0, positives_G, np.nan)
    first_G = np.maximum.reduceat(labels_R / place_R, starts_G) if len(starts_G) else starts_G
    return {
        "mrr": first_G * (asked_G / asked_G),
        f"map@{k}": np.bincount(group_R, within_R * precision_R) / np.minimum(asked_G, k),
        f"recall@{k}": np.bincount(group_R, within_R) / asked_G,
    }


def coverage(scores_R: np.ndarray, groups_R: np.ndarray, items_R: np.ndarray, k: int) -> float:
    """Share of the distinct items that stand among the first k rows of a group at least once; ties by item, ascending."""
    _check_same_length(scores_R, groups_R)
    _check_same_length(scores_R, items_R)
    names, item_R = np.unique(items_R, return_inverse=True)
    _, group_R = np.unique(groups_R, return_inverse=True)
    order_R = np.lexsort((item_R, -np.asarray(scores_R, dtype=np.float64), group_R))
    size_G = np.bincount(group_R)
    place_R = np.arange(len(order_R)) - (np.cumsum(size_G) - size_G)[group_R[order_R]]
    return float(len(np.unique(item_R[order_R][place_R < k])) / len(names)) if len(names) else float("nan")


def relative_calibration(labels_R: np.ndarray, probabilities_R: np.ndarray) -> float:
    """Predicted positives per observed positive: 1 is right, 2 promises twice as many. NaN without a positive row.

    For rare heads, whose ECE is small whatever they answer.
    """
    _check_same_length(labels_R, probabilities_R)
    observed = float(np.sum(labels_R, dtype=np.float64))
    return float(np.sum(probabilities_R, dtype=np.float64) / observed) if observed else float("nan")


def reliability(labels_R: np.ndarray, probabilities_R: np.ndarray, num_bins: int = BINS) -> np.ndarray:
    """float64 [bins, 3]: mean prediction, observed rate and rows of each of `num_bins` bins of equal row count."""
    _check_same_length(labels_R, probabilities_R)
    bin_R = bins_of(probabilities_R, num_bins)
    rows_N = np.bincount(bin_R)
    return np.column_stack([np.bincount(bin_R, probabilities_R) / rows_N, np.bincount(bin_R, labels_R) / rows_N, rows_N])


def bins_of(probabilities_R: np.ndarray, num_bins: int = BINS) -> np.ndarray:
    """int64 [R]: which bin of equal row count each row is in, lowest first; the first bins hold one row more where that does
    not come out even."""
    bin_R = np.empty(len(probabilities_R), dtype=np.int64)
    order = np.argsort(probabilities_R, kind="stable")
    for number, rows in enumerate(np.array_split(order, num_bins)):
        bin_R[rows] = number
    return bin_R


def _mean_of_defined(value_G: np.ndarray) -> float:
    defined_G = value_G[~np.isnan(value_G)]
    return float(defined_G.mean()) if len(defined_G) else float("nan")


def _check_same_length(labels_R: np.ndarray, other_R: np.ndarray) -> None:
    if len(labels_R) != len(other_R):
        raise ValueError(
            f"labels and scores or groups must have the same number of rows, got {len(labels_R)} and {len(other_R)}"
        )
