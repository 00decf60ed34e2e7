"""A small training export with something to learn: readers like a topic, notes differ; features are as of the request."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

START_US = 1_650_000_000_000_000
HOUR_US = 3_600_000_000
NUM_USERS, NUM_NOTES, NUM_AUTHORS, NUM_TOPICS, DAYS, TEST_DAYS = 150, 120, 30, 5, 6, 2
SURFACES = ("tab_0", "tab_1", "tab_1", "tab_1")
TIMESTAMP = pa.timestamp("us", "UTC")


def write_export(folder: Path, seed: int = 7, num_rows: int = 4000) -> Path:
    """The files of `headrace export-training`; the same seed writes the same rows."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    author_of = rng.integers(0, NUM_AUTHORS, NUM_NOTES)
    topic_of = rng.integers(0, NUM_TOPICS, NUM_NOTES)
    quality = rng.normal(0, 0.8, NUM_NOTES)
    taste = rng.integers(0, NUM_TOPICS, NUM_USERS)
    is_keen = rng.random(NUM_USERS) < 0.5
    watched = [
        [int(note) for note in rng.choice(NUM_NOTES, rng.integers(0, 12), p=_preference(topic_of, taste[user]))]
        for user in range(NUM_USERS)
    ]
    request_us = np.sort(START_US + rng.integers(0, DAYS * 24 * HOUR_US, num_rows))
    counts: dict[tuple, int] = defaultdict(int)
    clicked: dict[int, list[int]] = defaultdict(list)
    rows = []
    for place, t_us in enumerate(request_us.tolist()):
        user, note = int(rng.integers(NUM_USERS)), int(rng.integers(NUM_NOTES))
        author, surface = int(author_of[note]), SURFACES[int(rng.integers(len(SURFACES)))]
        logit = quality[note] + 1.5 * (topic_of[note] == taste[user]) + 1.2 * is_keen[user] + 0.8 * (surface == "tab_1") - 2.0
        click = int(rng.random() < 1 / (1 + np.exp(-logit)))
        long_view = int(rng.random() < 1 / (1 + np.exp(-(logit - 0.5))))
        keys = {"user": ("u", user), "note": ("n", note), "author": ("a", author), "user_author": ("ua", user, author)}
        row = {
            "impression_id": f"i{place:05d}",
            "user_id": f"u{user}",
            "note_id": f"n{note}",
            "author_id": f"a{author}",
            "surface": surface,
            "request_ts": t_us,
            "feature_watermark": t_us - t_us % (300 * 1_000_000),
        }
        for entity, key in keys.items():
            views, clicks = counts[(*key, "view")], counts[(*key, "click")]
            row |= {f"{entity}_num_views_7d": float(views), f"{entity}_num_clicks_7d": float(clicks)}
            row[f"{entity}_ctr_7d"] = clicks / views if views else None
        row |= {
            "user_last_clicks_30d": [f"n{clicked_note}" for clicked_note in clicked[user][-50:]],
            "note_duration_ms": float(5000 + 100 * note),
            "note_type": "video",
            "note_topic": f"t{topic_of[note]}",
            "note_age_min": (t_us - START_US) / 60e6,
            "label_click": click,
            "label_long_view": long_view,
        }
        rows.append(row)
        for key in keys.values():
            counts[(*key, "view")] += 1
            counts[(*key, "click")] += click
        if click:
            clicked[user].append(note)
    schema = _examples_schema(rows[0])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "examples.parquet")
    notes = {
        "note_id": [f"n{note}" for note in range(NUM_NOTES)],
        "author_id": [f"a{author}" for author in author_of],
        "topics": [[f"t{topic}"] for topic in topic_of],
        "note_type": ["video"] * NUM_NOTES,
        "duration_ms": [5000 + 100 * note for note in range(NUM_NOTES)],
        "created_at": pa.array([START_US] * NUM_NOTES, TIMESTAMP),
    }
    pq.write_table(pa.table(notes), folder / "notes.parquet")
    users = {
        "user_id": [f"u{user}" for user in range(NUM_USERS)],
        "created_at": pa.array([START_US] * NUM_USERS, TIMESTAMP),
        "attributes": [json.dumps({"keen": str(bool(keen)).lower()}) for keen in is_keen],
        "history_note_ids": pa.array([[f"n{note}" for note in notes] for notes in watched], pa.list_(pa.string())),
        "history_liked_note_ids": pa.array([[] for _ in watched], pa.list_(pa.string())),
    }
    pq.write_table(pa.table(users), folder / "users.parquet")
    manifest = {
        "dataset": "synthetic",
        "snapshots": {},
        "declarations_hash": "none",
        "test_start": START_US + (DAYS - TEST_DAYS) * 24 * HOUR_US,
        "num_rows": num_rows,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _preference(topic_of: np.ndarray, taste: int) -> np.ndarray:
    weight = np.where(topic_of == taste, 4.0, 1.0)
    return weight / weight.sum()


def _examples_schema(row: dict) -> pa.Schema:
    kinds = {"request_ts": TIMESTAMP, "feature_watermark": TIMESTAMP, "user_last_clicks_30d": pa.list_(pa.string())}
    words = ("impression_id", "user_id", "note_id", "author_id", "surface", "note_type", "note_topic")
    fields = []
    for name in row:
        kind = pa.int32() if name.startswith("label_") else pa.string() if name in words else kinds.get(name, pa.float64())
        fields.append(pa.field(name, kind))
    return pa.schema(fields)
