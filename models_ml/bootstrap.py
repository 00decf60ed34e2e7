"""95 % intervals of the metrics: the readers, with all their rows, are drawn again with replacement (Field & Welsh 2007).

A draw is a count per reader, and what it makes of a metric follows from sums per reader or from one pass over rows sorted
once; nothing is copied or sorted again. The same seed and the same readers give the same draws, so intervals of different
metrics, heads and models are of the same redrawn readers. Percentile intervals: the 2.5th and the 97.5th.
No interval of coverage: a draw holds about 63 % of the readers, and fewer readers always reach fewer notes.
R rows, U readers, G groups of tied scores, M metrics.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from models_ml import metrics

SAMPLES = 400


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval: the 2.5th and the 97.5th. NaN where no draw defines the metric."""

    low: float
    high: float


def of_head(
    labels_R: np.ndarray,
    probability_R: np.ndarray,
    users_R: np.ndarray,
    base_rate: float,
    k: int,
    num_samples: int = SAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Metric -> interval, of every metric of a head but coverage, as `metrics` defines them: `grouped_auc`, `ndcg@k` and lists
    per reader, `nce` against this base rate. ECE's lies high: a draw adds noise, and ECE counts all of it as error."""
    num_users, user_R = _numbered(users_R)
    labels_R, probability_R = (np.asarray(values, dtype=np.float64) for values in (labels_R, probability_R))

    def sums(values_R: np.ndarray) -> np.ndarray:
        return np.bincount(user_R, values_R, minlength=num_users)

    size_U = sums(np.ones(len(user_R)))
    auc_U, cross_entropy_U = (
        metrics.auc_of_groups(labels_R, probability_R, user_R),
        sums(metrics.losses(labels_R, probability_R)),
    )
    parts = {
        "grouped_auc": (np.nan_to_num(auc_U) * size_U, size_U * ~np.isnan(auc_U)),
        "loss_over_baseline": (cross_entropy_U, sums(metrics.losses(labels_R, np.full(len(user_R), base_rate)))),
        "log_loss": (cross_entropy_U, size_U),
        "relative_calibration": (sums(probability_R), sums(labels_R)),
    }
    lists = {f"ndcg@{k}": metrics.ndcg_of_groups(labels_R, probability_R, user_R, k)}
    for name, value_U in (lists | metrics.lists_of_groups(labels_R, probability_R, user_R, k)).items():
        parts[name] = (np.nan_to_num(value_U), ~np.isnan(value_U))
    of_rows = _OfRows(labels_R, probability_R, user_R)
    found = _intervals(parts, num_users, num_samples, seed, of_rows)
    over = found.pop("loss_over_baseline")
    return found | {"nce": Interval(1 - over.high, 1 - over.low)}


def of_means(
    values: Mapping[str, np.ndarray], users_R: np.ndarray, num_samples: int = SAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Name -> interval of the mean over the rows."""
    num_users, user_R = _numbered(users_R)
    size_U = np.bincount(user_R, minlength=num_users)
    parts = {name: (np.bincount(user_R, value_R, minlength=num_users), size_U) for name, value_R in values.items()}
    return _intervals(parts, num_users, num_samples, seed)


def of_auc_gain(
    labels_R: np.ndarray,
    scores_R: np.ndarray,
    floor_R: np.ndarray,
    users_R: np.ndarray,
    num_samples: int = SAMPLES,
    seed: int = 0,
) -> Interval:
    """Of auc(scores) - auc(floor), paired: both are of the same redrawn readers. Low > 0: it is better."""
    num_users, user_R = _numbered(users_R)
    better, floor = (_OfRows(labels_R, np.asarray(scores), user_R) for scores in (scores_R, floor_R))
    return _interval([better.auc(drawn_U) - floor.auc(drawn_U) for drawn_U in _draws(num_users, num_samples, seed)])


def of_bins(
    labels_R: np.ndarray, probability_R: np.ndarray, users_R: np.ndarray, num_samples: int = SAMPLES, seed: int = 0
) -> np.ndarray:
    """float64 [bins, 2]: of the observed rate of each bin of `metrics.reliability`, whose rows stay the same."""
    bin_R = metrics.bins_of(probability_R)
    names = [str(number) for number in range(int(bin_R.max(initial=-1)) + 1)]
    num_users, user_R = _numbered(users_R)
    parts = {}
    for number, name in enumerate(names):
        is_in_R = bin_R == number
        parts[name] = (
            np.bincount(user_R[is_in_R], np.asarray(labels_R)[is_in_R], minlength=num_users),
            np.bincount(user_R[is_in_R], minlength=num_users),
        )
    found = _intervals(parts, num_users, num_samples, seed)
    return np.array([(found[name].low, found[name].high) for name in names]).reshape(-1, 2)


class _OfRows:
    """Metrics that are no means over readers, as functions of a draw: `auc`, `pr_auc`, `ece`."""

    def __init__(self, labels_R: np.ndarray, scores_R: np.ndarray, user_R: np.ndarray):
        order_R = np.argsort(scores_R, kind="stable")
        self._user_R, self._score_R = user_R[order_R], np.asarray(scores_R, dtype=np.float64)[order_R]
        self._label_R = np.asarray(labels_R, dtype=np.float64)[order_R]
        self._starts_G = np.flatnonzero(np.r_[True, self._score_R[1:] != self._score_R[:-1]][: len(order_R)])

    def auc(self, drawn_U: np.ndarray) -> float:
        return metrics.auc_of_ties(*self._ties(drawn_U[self._user_R]))

    def __call__(self, drawn_U: np.ndarray) -> dict[str, float]:
        weight_R = drawn_U[self._user_R]
        positives_G, negatives_G = self._ties(weight_R)
        return {
            "auc": metrics.auc_of_ties(positives_G, negatives_G),
            "pr_auc": metrics.average_precision_of_ties(positives_G[::-1], (positives_G + negatives_G)[::-1]),
            "ece": self._ece(weight_R),
        }

    def _ties(self, weight_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positives_G = np.add.reduceat(weight_R * self._label_R, self._starts_G)
        return positives_G, np.add.reduceat(weight_R, self._starts_G) - positives_G

    def _ece(self, weight_R: np.ndarray, num_bins: int = metrics.BINS) -> float:
        """Of the rows repeated as often as they are drawn: bins of equal size end within a row's repetitions."""
        until_R = np.cumsum(weight_R)
        num_rows = int(until_R[-1])
        ends_B = np.cumsum([num_rows // num_bins + (place < num_rows % num_bins) for place in range(num_bins)])
        row_B = np.searchsorted(until_R, ends_B)
        gap_R = self._score_R - self._label_R
        gap_B = np.cumsum(weight_R * gap_R)[row_B] - (until_R[row_B] - ends_B) * gap_R[row_B]
        return float(np.abs(np.diff(gap_B, prepend=0.0)).sum() / num_rows)


def _intervals(
    parts: Mapping[str, tuple[np.ndarray, np.ndarray]],
    num_users: int,
    num_samples: int,
    seed: int,
    more: Callable[[np.ndarray], Mapping[str, float]] = lambda drawn_U: {},
) -> dict[str, Interval]:
    """Name -> interval of a ratio of sums over readers, and of what `more` says of a draw."""
    above_UM, below_UM = (np.column_stack([part[side] for part in parts.values()]).astype(np.float64) for side in (0, 1))
    found: dict[str, list[float]] = {}
    for drawn_U in _draws(num_users, num_samples, seed):
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = (drawn_U @ above_UM) / (drawn_U @ below_UM)
        for name, value in (dict(zip(parts, ratios.tolist(), strict=True)) | dict(more(drawn_U))).items():
            found.setdefault(name, []).append(value)
    return {name: _interval(values) for name, values in found.items()}


def _numbered(users_R: np.ndarray) -> tuple[int, np.ndarray]:
    distinct, user_R = np.unique(users_R, return_inverse=True)
    return len(distinct), user_R


def _draws(num_users: int, num_samples: int, seed: int) -> Iterator[np.ndarray]:
    """float64 [U]: how often each reader is drawn."""
    rng = np.random.default_rng(seed)
    for _ in range(num_samples):
        yield np.bincount(rng.integers(0, num_users, num_users), minlength=num_users).astype(np.float64)


def _interval(values: list[float]) -> Interval:
    defined = [value for value in values if np.isfinite(value)]
    low, high = np.percentile(defined, [2.5, 97.5]) if defined else (np.nan, np.nan)
    return Interval(float(low), float(high))
