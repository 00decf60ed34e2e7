"""The requests that training is measured on know what had happened by their tick, and nothing later."""

import numpy as np
import pyarrow.compute as pc

from bench import simulated_requests
from models_ml.request_rows import HISTORY, HISTORY_PLACES, offsets_of
from warehouse.datasets.simulator import simulate
from warehouse.time_algebra import FIVE_MINUTES_US, HOUR_US


def test_counts_and_histories_are_those_of_the_log_before_the_tick():
    table = simulated_requests.requests(60, seed=3)
    world = simulate(3, 20, 3000, 8, requests_per_user_day=60 / 20 / 8, notes_per_request=60)
    seen = set()
    events = [one for one in world.events.to_pylist() if not (one["event_id"] in seen or seen.add(one["event_id"]))]
    shown = set(table["impression_id"].combine_chunks().flatten().to_pylist())
    events = [one for one in events if one["impression_id"] in shown]
    before = dict(zip(world.users["user_id"].to_pylist(), world.users[HISTORY].to_pylist(), strict=True))
    counts = np.diff(offsets_of(table))
    assert counts.min() >= 20
    assert counts.max() <= 60
    assert pc.all(pc.greater_equal(table["request_ts"][1:], table["request_ts"][:-1])).as_py()
    for row in table.slice(len(table) - 12).to_pylist():
        tick_us = int(row["request_ts"].timestamp() * 1e6) // FIVE_MINUTES_US * FIVE_MINUTES_US
        age_us = [tick_us - round(one["event_ts"].timestamp() * 1e6) for one in events]
        known = [(one, age) for one, age in zip(events, age_us, strict=True) if age > 0]

        def count(kind, window_us, known=known, **ids):
            return sum(
                one["event_type"] == kind and age <= window_us and all(one[name] == value for name, value in ids.items())
                for one, age in known
            )

        user = row["user_id"]
        assert row["user_num_views_1d"] == count("view", 24 * HOUR_US, user_id=user)
        assert row["user_num_likes_7d"] == count("like", 7 * 24 * HOUR_US, user_id=user)
        for place in (0, 7):
            note, author = row["note_id"][place], row["author_id"][place]
            assert row["note_num_views_1h"][place] == count("view", HOUR_US, note_id=note)
            assert row["user_author_num_clicks_7d"][place] == count("click", 7 * 24 * HOUR_US, user_id=user, author_id=author)
            clicked = any(
                one["event_type"] == "click" and one["impression_id"] == row["impression_id"][place] for one in events
            )
            assert row["label_click"][place] == clicked
        clicks = sorted((-age, one["note_id"]) for one, age in known if one["event_type"] == "click" and one["user_id"] == user)
        assert row[HISTORY] == [*before[user], *(note for _, note in clicks)][-HISTORY_PLACES:]
