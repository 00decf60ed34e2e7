"""Training rows with the values that were served: the forward log's features in place of those worked out afterwards.

Source of the columns: docs/reference/contracts.md, "Forward log". Labels, words and dimensions are the export's.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from models_ml.examples import CLICKS, Examples
from warehouse.errors import HeadraceError


def as_served(examples: Examples, log: pa.Table) -> Examples:
    """The rows of the export that the log shows as served, in the export's order, with the log's request time, features
    (NULL where it has none) and clicks; so the notes of one page share a request row.

    log: `lake.forward_log`. Raises HeadraceError when no impression of the export is in it.
    """
    place_of = {impression: place for place, impression in enumerate(examples.words["impression_id"].to_pylist())}
    column_of = {name: column for column, name in enumerate(examples.feature_names)}
    rows, values, request_us, clicks = [], [], [], []
    request_us_L = log["request_ts"].cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_pylist()
    parts = (log[name].to_pylist() for name in ("user_features", "user_sequences", "candidates"))
    for at_us, user_features, sequences, candidates in zip(request_us_L, *parts, strict=True):
        of_reader = dict(user_features or ())
        clicked = dict(sequences or ()).get(CLICKS) or []
        for candidate in candidates or ():
            place = place_of.get(candidate["impression_id"]) if candidate["shown"] else None
            if place is None:
                continue
            value_F = np.full(len(column_of), np.nan)
            for name, value in (*of_reader.items(), *(candidate["features"] or ())):
                if name in column_of and value is not None:
                    value_F[column_of[name]] = value
            rows.append(place)
            values.append(value_F)
            request_us.append(at_us)
            clicks.append(clicked)
    if not rows:
        raise HeadraceError("no impression of the export is in the forward log; serve feeds, land their events, export again")
    order = np.argsort(rows)
    chosen = np.asarray(rows)[order]
    return replace(
        examples,
        manifest={**examples.manifest, "values": "as served", "num_rows": len(rows)},
        values_RF=np.stack(values)[order],
        labels={name: label_R[chosen] for name, label_R in examples.labels.items()},
        request_us_R=np.asarray(request_us)[order],
        words=examples.words.take(pa.array(chosen)).combine_chunks(),
        clicks_R=pa.array(clicks, pa.list_(pa.string())).take(pa.array(order)),
    )
