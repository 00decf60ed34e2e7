import numpy as np
import pyarrow as pa
import pytest

from models_ml import request_rows
from models_ml.logged_rows import as_served
from warehouse.errors import HeadraceError

SERVED_US = 1_650_000_500_000_000


def _log(candidates):
    kinds = pa.schema(
        [
            ("request_ts", pa.timestamp("us", "UTC")),
            ("user_features", pa.map_(pa.string(), pa.float64())),
            ("user_sequences", pa.map_(pa.string(), pa.list_(pa.string()))),
            (
                "candidates",
                pa.list_(
                    pa.struct(
                        [
                            ("impression_id", pa.string()),
                            ("shown", pa.bool_()),
                            ("features", pa.map_(pa.string(), pa.float64())),
                        ]
                    )
                ),
            ),
        ]
    )
    row = {
        "request_ts": SERVED_US,
        "user_features": [("user_num_views_7d", 41.0)],
        "user_sequences": [("user_last_clicks_30d", ["n3", "n4"])],
        "candidates": candidates,
    }
    return pa.Table.from_pylist([row], schema=kinds)


def test_served_values_take_the_place_of_those_worked_out_and_a_page_is_one_request(loaded):
    first = loaded.words["user_id"][7].as_py()
    rows = [row for row in loaded.train_rows[:600] if loaded.words["user_id"][int(row)].as_py() == first][:2]
    ids = [loaded.words["impression_id"][int(row)].as_py() for row in rows]
    surfaces = {loaded.words["surface"][int(row)].as_py() for row in rows}
    shown = [{"impression_id": one, "shown": True, "features": [("note_num_views_7d", 7.0 + i)]} for i, one in enumerate(ids)]
    others = [
        {"impression_id": loaded.words["impression_id"][99].as_py(), "shown": False, "features": []},
        {"impression_id": "unknown", "shown": True, "features": []},
    ]
    served = as_served(loaded, _log([*reversed(shown), *others]))
    assert served.words["impression_id"].to_pylist() == ids
    column = served.feature_names.index("note_num_views_7d")
    assert served.values_RF[:, column].tolist() == [7.0, 8.0]
    assert (served.values_RF[:, served.feature_names.index("user_num_views_7d")] == 41.0).all()
    assert np.isnan(served.values_RF[:, served.feature_names.index("author_num_views_7d")]).all()
    assert served.labels["click"].tolist() == loaded.labels["click"][rows].tolist()
    table = request_rows.requests_of(served, np.arange(2))
    assert len(table) == len(surfaces)
    assert table["request_ts"].cast(pa.int64()).to_pylist() == [SERVED_US] * len(surfaces)
    assert table["history_note_ids"][0].as_py()[-2:] == ["n3", "n4"]


def test_a_log_of_other_impressions_is_refused(loaded):
    with pytest.raises(HeadraceError, match="no impression of the export is in the forward log"):
        as_served(loaded, _log([{"impression_id": "unknown", "shown": True, "features": []}]))
