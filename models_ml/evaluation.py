"""What the models are worth on the test days, as plain numbers for `report.json`. R test rows, Q queries, N notes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from models_ml import bootstrap, metrics, slices
from models_ml.examples import Examples, encode, require_columns
from models_ml.item_to_item import ItemToItem
from models_ml.two_tower import TwoTower
from warehouse.errors import HeadraceError

NDCG_AT = 10
RECALL_AT = (50, 200, 500)
MOST_QUERIES = 3000
POPULAR_DAYS = 2
SEEDS = 20

RANKING_RULES = (
    "*_low, *_high: 2.5th and 97.5th percentile over redrawn readers, the same for every metric and head (none of coverage, "
    "which fewer readers always lower; that of ece lies high, as a draw adds noise); auc: ties count half; "
    "nce: against the training rows' base rate; grouped_auc: per reader with both classes, weighted by rows; "
    "pr_auc: tied rows come in together; "
    f"ndcg@{NDCG_AT}: per reader with a positive row, tied rows share their places' mean discount; "
    f"mrr, map@{NDCG_AT}, recall@{NDCG_AT}: per reader with a positive row, a negative stands before a positive of its score; "
    f"coverage@{NDCG_AT}: share of the test rows' notes among a reader's first; ece: 15 bins of equal size; "
    "relative_calibration: predicted over observed positives"
)
RETRIEVAL_RULES = (
    "each clicked test impression is a query from the reader's history at that request (at most 50 notes, those masked); "
    "rank among all notes of the dimension; a tie takes the mean place of its group; "
    "*_low, *_high: 2.5th and 97.5th percentile over redrawn readers"
)


def ranking(
    examples: Examples, predictions: Mapping[str, np.ndarray], num_samples: int = bootstrap.SAMPLES
) -> dict[str, dict[str, float]]:
    """Head -> metric -> value. predictions: head -> probabilities of the test rows, in their order. num_samples: draws of the
    intervals; 0 leaves them out."""
    rows = examples.test_rows
    users_R, notes_R = users_of(examples, rows), _dictionary_codes(examples.words["note_id"].take(rows))
    return {
        head: of_head(
            examples.labels[head][rows],
            probability_R,
            users_R,
            notes_R,
            float(examples.labels[head][examples.train_rows].mean()),
            num_samples,
        )
        for head, probability_R in predictions.items()
    }


def of_head(
    labels_R: np.ndarray,
    probability_R: np.ndarray,
    users_R: np.ndarray,
    notes_R: np.ndarray,
    base_rate: float,
    num_samples: int = bootstrap.SAMPLES,
) -> dict[str, float]:
    """Every metric of one head on some rows, under RANKING_RULES, each followed by its interval. users_R, notes_R: codes."""
    values = {
        "auc": metrics.auc(labels_R, probability_R),
        "grouped_auc": metrics.grouped_auc(labels_R, probability_R, users_R),
        "pr_auc": metrics.average_precision(labels_R, probability_R),
        "nce": metrics.normalised_cross_entropy(labels_R, probability_R, base_rate),
        "log_loss": metrics.log_loss(labels_R, probability_R),
        f"ndcg@{NDCG_AT}": metrics.ndcg(labels_R, probability_R, users_R, NDCG_AT),
        **metrics.ranked_lists(labels_R, probability_R, users_R, NDCG_AT),
        f"coverage@{NDCG_AT}": metrics.coverage(probability_R, users_R, notes_R, NDCG_AT),
        "ece": metrics.expected_calibration_error(labels_R, probability_R),
        "relative_calibration": metrics.relative_calibration(labels_R, probability_R),
    }
    if not num_samples:
        return values
    return with_intervals(values, bootstrap.of_head(labels_R, probability_R, users_R, base_rate, NDCG_AT, num_samples))


def with_intervals(values: Mapping[str, float], intervals: Mapping[str, bootstrap.Interval]) -> dict[str, float]:
    """Each metric, and after it `<metric>_low` and `<metric>_high` where it has an interval."""
    report: dict[str, float] = {}
    for name, value in values.items():
        report[name] = value
        if name in intervals:
            report |= {f"{name}_low": intervals[name].low, f"{name}_high": intervals[name].high}
    return report


def is_learned(values: Mapping[str, float | None]) -> bool:
    """Whether a head's AUC is above chance by more than its rows leave open. values: of `of_head`."""
    low = values["auc_low"]
    return low is not None and low > 0.5


def nullable(value: Any) -> Any:
    """The same with None where a metric is not defined (no positive row, say): JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {key: nullable(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def by_slice(
    examples: Examples, predictions: Mapping[str, np.ndarray], names: Sequence[str], num_samples: int = bootstrap.SAMPLES
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Slice -> part -> head -> metric -> value, beside `num_rows`; parts in order of their rows, most first."""
    rows = examples.test_rows
    users_R, notes_R = users_of(examples, rows), _dictionary_codes(examples.words["note_id"].take(rows))
    report: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for name in names:
        part_R = slices.values_of(examples, rows, name)
        parts, counts = np.unique(part_R, return_counts=True)
        report[name] = {}
        for part in parts[np.argsort(-counts, kind="stable")]:
            some = np.flatnonzero(part_R == part)
            report[name][str(part)] = {
                head: {
                    "num_rows": len(some),
                    **of_head(
                        examples.labels[head][rows[some]],
                        probability_R[some],
                        users_R[some],
                        notes_R[some],
                        float(examples.labels[head][examples.train_rows].mean()),
                        num_samples,
                    ),
                }
                for head, probability_R in predictions.items()
            }
    return report


def gain(examples: Examples, model: Mapping[str, np.ndarray], floor: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Head -> how much higher the model's AUC is than the floor's, with its paired interval: `low` > 0 means it is higher."""
    rows = examples.test_rows
    users_R = users_of(examples, rows)
    report = {}
    for head in model.keys() & floor.keys():
        labels_R = examples.labels[head][rows]
        interval = bootstrap.of_auc_gain(labels_R, model[head], floor[head], users_R)
        report[head] = {"auc": metrics.auc(labels_R, model[head]) - metrics.auc(labels_R, floor[head]), **asdict(interval)}
    return dict(sorted(report.items()))


class RetrievalQueries:
    """The same queries for every generator: at most MOST_QUERIES clicked test impressions, drawn with a fixed seed.

    num_samples: draws of readers for the intervals of recall; 0 leaves them out.
    """

    def __init__(self, examples: Examples, num_samples: int = bootstrap.SAMPLES):
        self.note_ids: list[str] = examples.notes["note_id"].to_pylist()
        self._place_of = {note_id: place for place, note_id in enumerate(self.note_ids)}
        self._code_R = encode(examples.words["note_id"], self.note_ids)
        test_rows = examples.test_rows
        rows = test_rows[(examples.labels["click"][test_rows] == 1) & (self._code_R[test_rows] > 0)]
        if len(rows) > MOST_QUERIES:
            rows = np.sort(np.random.default_rng(0).choice(rows, MOST_QUERIES, replace=False))
        self._examples, self._rows, self._num_samples = examples, rows, num_samples
        self._history_QL = examples.histories(self.note_ids, 50)[rows]
        self._target_Q = self._code_R[rows] - 1

    def __len__(self) -> int:
        return len(self._target_Q)

    def popularity(self) -> dict[str, float]:
        """Most clicked in the last days before `test_start`: the same for everybody."""
        examples, rows = self._examples, self._examples.train_rows
        recent = examples.request_us_R[rows] >= examples.test_start_us - POPULAR_DAYS * 86_400_000_000
        rows = rows[recent & (examples.labels["click"][rows] == 1)]
        clicks_N = np.bincount(self._code_R[rows], minlength=len(self.note_ids) + 1)[1:].astype(np.float32)
        return self._recall(lambda some: np.tile(clicks_N, (len(some), 1)))

    def item_to_item(self, model: ItemToItem) -> dict[str, float]:
        """Asked with the last SEEDS notes of the history."""

        def scores(some: np.ndarray) -> np.ndarray:
            scores_QN = np.zeros((len(some), len(self.note_ids)), dtype=np.float32)
            for query, history_L in enumerate(self._history_QL[some]):
                seeds = [self.note_ids[code - 1] for code in history_L[:SEEDS][::-1] if code]
                for note_id, score in model.neighbours(seeds, max(RECALL_AT) * 4) if seeds else ():
                    if note_id in self._place_of:  # a model of another export may know others
                        scores_QN[query, self._place_of[note_id]] = score
            return scores_QN

        return self._recall(scores)

    def two_tower(self, model: TwoTower) -> dict[str, float]:
        """Product of the reader's vector and every note's. Raises HeadraceError when the model was trained on other notes."""
        if list(model.note_ids) != self.note_ids:
            raise HeadraceError(
                f"two_tower knows {len(model.note_ids):,} notes, the export has {len(self.note_ids):,}, and they are not the "
                "same: train it on this export, or name its own with --export"
            )
        user_QD = self.vectors_of_readers(model)
        return self._recall(lambda some: user_QD[some] @ model.note_vectors.T)

    def vectors_of_readers(self, model: TwoTower) -> np.ndarray:
        """float32 [Q, D]: the readers' vectors at the queries."""
        require_columns(self._examples, model.user_features)
        histories = self._examples.histories(model.note_ids, model.history_length)[self._rows]
        return model.user_vectors(histories, model.reader.of_rows(self._examples, self._rows))

    def _recall(self, scores: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
        """scores: of some queries, by their places."""
        places = []
        for some in np.array_split(np.arange(len(self)), max(1, len(self) // 500)):
            scores_QN = scores(some)
            places.append(mean_places(scores_QN, self._history_QL[some], self._target_Q[some]))
        places_Q = np.concatenate(places)
        recall = recall_at(places_Q, RECALL_AT)
        if not self._num_samples:
            return recall
        is_found = {f"recall@{k}": places_Q < k for k in RECALL_AT}
        return with_intervals(recall, bootstrap.of_means(is_found, users_of(self._examples, self._rows), self._num_samples))


def mean_places(scores_QN: np.ndarray, history_QL: np.ndarray, target_Q: np.ndarray) -> np.ndarray:
    """float64 [Q]: 0-based place of the target among the notes not in the history (codes: 1 + place, 0 = padding).

    Ties take the mean place of their group; infinity where the target itself is in the history.
    """
    masked_QN = np.concatenate([np.zeros((len(scores_QN), 1), scores_QN.dtype), scores_QN], axis=1)
    np.put_along_axis(masked_QN, history_QL, -np.inf, axis=1)
    masked_QN = masked_QN[:, 1:]
    own_Q1 = np.take_along_axis(masked_QN, target_Q[:, None], axis=1)
    above_Q, tied_Q = (masked_QN > own_Q1).sum(1), (masked_QN == own_Q1).sum(1)
    return np.where(np.isneginf(own_Q1[:, 0]), np.inf, above_Q + (tied_Q - 1) / 2)


def recall_at(places_Q: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Share of queries whose target is among the first k: one relevant note per query."""
    return {f"recall@{k}": float((places_Q < k).mean()) if len(places_Q) else float("nan") for k in ks}


def users_of(examples: Examples, rows: np.ndarray) -> np.ndarray:
    """int [R]: a number for each reader."""
    return _dictionary_codes(examples.words["user_id"].take(rows))


def _dictionary_codes(words: pa.ChunkedArray) -> np.ndarray:
    return words.combine_chunks().dictionary_encode().indices.to_numpy()
