"""The SQL and the arrays agree, on rows full of ties, empty groups and one-sided groups."""

import math

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from models_ml import metrics
from models_ml.metrics_sql import METRICS, SERVED_ROWS


def scored_rows(num_rows: int, num_groups: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, num_groups, num_rows)
    scores = np.round(rng.random(num_rows) * 0.8 + 0.1, 1 if seed % 2 else 6)
    labels = (rng.random(num_rows) < scores * (groups % 3 > 0)).astype(int)
    return pa.table({"row_id": np.arange(num_rows), "group_id": groups, "label": labels, "score": scores})


@pytest.mark.parametrize(("num_rows", "num_groups", "seed"), [(2000, 150, 1), (2000, 150, 2), (17, 17, 3), (15, 1, 4)])
def test_sql_and_arrays_give_the_same_metrics(num_rows, num_groups, seed):
    rows = scored_rows(num_rows, num_groups, seed)
    labels, scores, groups = (rows[name].to_numpy() for name in ("label", "score", "group_id"))
    with duckdb.connect() as connection:
        connection.register("scored_rows", rows)
        found = connection.execute(METRICS, {"base_rate": 0.3, "k": 5, "bins": 15}).to_arrow_table().to_pylist()[0]
    lists = metrics.ranked_lists(labels, scores, groups, 5)
    expected = {
        "num_rows": num_rows,
        "num_positives": labels.sum(),
        "auc": metrics.auc(labels, scores),
        "grouped_auc": metrics.grouped_auc(labels, scores, groups),
        "pr_auc": metrics.average_precision(labels, scores),
        "nce": metrics.normalised_cross_entropy(labels, scores, 0.3),
        "log_loss": metrics.log_loss(labels, scores),
        "ndcg": metrics.ndcg(labels, scores, groups, 5),
        "mrr": lists["mrr"],
        "map": lists["map@5"],
        "recall": lists["recall@5"],
        "ece": metrics.expected_calibration_error(labels, scores),
        "relative_calibration": metrics.relative_calibration(labels, scores),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (math.nan if found[name] is None else found[name]) == pytest.approx(value, rel=1e-9, nan_ok=True), name


def test_rows_of_the_forward_log_are_the_shown_candidates_and_what_became_of_them():
    with duckdb.connect() as connection:
        connection.execute("set timezone = 'UTC'")
        connection.execute(
            """
            create table forward_log as
            select 'ann' as user_id, timestamptz '2026-01-01 10:00:00+00' as request_ts, [
                {'impression_id': 'a', 'note_id': 'x', 'shown': true, 'predictions': map {'click': 0.9}},
                {'impression_id': 'b', 'note_id': 'y', 'shown': true, 'predictions': map {'click': 0.2}},
                {'impression_id': 'c', 'note_id': 'z', 'shown': false, 'predictions': map {'click': 0.8}}
            ] as candidates
            union all
            select 'bob', timestamptz '2026-01-01 12:00:00+00', [
                {'impression_id': 'd', 'note_id': 'x', 'shown': true, 'predictions': map {'click': 0.5}}
            ];
            create table events as
            select * from (values
                ('a', 'click', timestamptz '2026-01-01 10:01:00+00'),
                ('a', 'click', timestamptz '2026-01-01 10:02:00+00'),
                ('b', 'like', timestamptz '2026-01-01 10:03:00+00'),
                ('b', 'click', timestamptz '2026-01-01 11:30:00+00')
            ) as events (impression_id, event_type, event_ts)
            """
        )
        found = connection.execute(
            f"select row_id, group_id, note_id, label, score from ({SERVED_ROWS}) order by row_id",
            {"head": "click", "until": "2026-01-01 11:00:00+00", "wait_min": 10},
        ).fetchall()
    assert found == [("a", "ann", "x", 1, 0.9), ("b", "ann", "y", 0, 0.2)]
