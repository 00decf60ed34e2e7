from datetime import UTC, datetime, timedelta

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from sklearn.metrics import roc_auc_score

from warehouse.datasets.base import DATASET_EVENTS_SCHEMA, NOTES_SCHEMA, USERS_SCHEMA, Dataset
from warehouse.datasets.simulator import FEWEST_NOTES, NOTES_PER_REQUEST, TOPICS, simulate, simulate_with_truth
from warehouse.events import EVENT_TYPES

START = datetime(2022, 4, 25, tzinfo=UTC)
SMALL = {"num_users": 300, "num_notes": 200, "days": 4, "start": START, "requests_per_user_day": 1.5}


@pytest.fixture(scope="module")
def simulated():
    return simulate_with_truth(seed=3, **SMALL)


@pytest.fixture(scope="module")
def query(simulated):
    dataset, truth = simulated
    with duckdb.connect() as connection:
        for name in ("events", "notes", "users"):
            connection.register(name, getattr(dataset, name))
        connection.register("truth", truth)
        yield lambda sql: connection.execute(sql).fetchall()


def test_tables_have_the_shape_of_the_lake(simulated):
    dataset, _ = simulated
    assert dataset.events.schema == DATASET_EVENTS_SCHEMA
    assert dataset.notes.schema == NOTES_SCHEMA
    assert dataset.users.schema == USERS_SCHEMA


def test_events_come_in_order_of_arrival(simulated):
    landed_us = simulated[0].events["landed_at"].cast(pa.int64()).to_numpy()
    assert np.all(np.diff(landed_us) >= 0)


def test_every_type_of_event_occurs(query):
    assert {event_type for (event_type,) in query("select distinct event_type from events")} == set(EVENT_TYPES)


def test_the_same_arguments_give_the_same_data_set_and_another_seed_another():
    first, again, other = (simulate(seed=seed, **SMALL) for seed in (1, 1, 2))
    assert (first.events, first.notes, first.users) == (again.events, again.notes, again.users)
    assert first.events != other.events


def test_a_request_shows_its_notes_once_each(query):
    shown = query("""
        select count(distinct impression_id), count(distinct note_id), count(distinct user_id)
        from events where event_type = 'view' group by request_id
    """)
    assert set(shown) == {(NOTES_PER_REQUEST, NOTES_PER_REQUEST, 1)}


def test_requests_show_as_many_notes_as_are_asked_for():
    views = simulate(num_users=20, num_notes=100, days=1, notes_per_request=25).events
    views = views.filter(pc.equal(views["event_type"], "view"))
    shown = views.group_by("request_id").aggregate([("note_id", "count_distinct")])
    assert set(shown["note_id_count_distinct"].to_pylist()) == {25}


def test_no_note_is_shown_before_it_exists(query):
    assert query("select count(*) from events inner join notes using (note_id) where event_ts < created_at") == [(0,)]


def test_some_notes_appear_while_the_log_runs(query):
    ((share,),) = query("select avg((created_at > (select min(event_ts) from events))::int) from notes")
    assert 0.1 < share < 0.3


def test_every_action_names_an_impression_that_was_viewed_by_the_same_user(query):
    assert query("""
        with views as (select impression_id, user_id, note_id from events where event_type = 'view')

        select count(*) from events anti join views using (impression_id, user_id, note_id)
    """) == [(0,)]


def test_ids_of_events_are_known_notes_and_users(query):
    assert query("select count(*) from events anti join notes using (note_id, author_id)") == [(0,)]
    assert query("select count(*) from events anti join users using (user_id)") == [(0,)]


def test_about_two_in_a_hundred_impressions_arrive_again(query):
    ((again,),) = query("select 1 - count(distinct event_id) / count(*) from events where event_type = 'view'")
    assert again == pytest.approx(0.02, abs=0.005)


def test_some_of_what_arrives_again_has_another_payload(query):
    ((differing,),) = query("""
        select count(*) from (select event_id from events group by event_id having count(distinct properties) > 1)
    """)
    assert differing > 0


def test_an_oracle_tells_clicks_from_skips(query):
    rows = query("""
        select truth.click_probability, clicks.impression_id is not null
        from truth
        left join (select distinct impression_id from events where event_type = 'click') as clicks
            on truth.impression_id = clicks.impression_id
    """)
    probability, clicked = zip(*rows, strict=True)
    assert roc_auc_score(clicked, probability) > 0.78
    assert np.mean(probability) == pytest.approx(np.mean(clicked), abs=0.01)


def test_a_tenth_of_the_notes_gets_more_than_a_third_of_the_views_and_nights_are_quiet():
    dataset = simulate(num_users=1000, num_notes=1000, days=4, requests_per_user_day=1.0)
    views = dataset.events.filter(pc.equal(dataset.events["event_type"], "view"))
    per_note = np.sort(views["note_id"].value_counts().field("counts").to_numpy())[::-1]
    assert per_note[:100].sum() > 0.33 * len(views)
    per_hour = np.bincount(pc.hour(views["event_ts"]).to_numpy(), minlength=24)
    assert per_hour[20:22].sum() > 5 * per_hour[2:4].sum()


def test_history_holds_notes_that_existed_before_the_log_and_likes_are_among_them(query):
    assert query("""
        with watched as (select user_id, unnest(history_note_ids) as note_id from users)

        select count(*) > 0, count(*) filter (where notes.created_at >= timestamptz '2022-04-25 00:00:00+00')
        from watched inner join notes on watched.note_id = notes.note_id
    """) == [(True, 0)]
    assert query("select count(*) from users where not list_has_all(history_note_ids, history_liked_note_ids)") == [(0,)]


def test_topics_are_one_or_two_of_the_list(query):
    assert {count for (count,) in query("select distinct len(topics) from notes")} == {1, 2}
    assert {topic for (topic,) in query("select distinct unnest(topics) from notes")} <= set(TOPICS)


def test_the_smallest_feed_works():
    dataset = simulate(num_users=1, num_notes=FEWEST_NOTES, days=1, requests_per_user_day=0.001)
    assert pc.count_distinct(dataset.events["request_id"]).as_py() == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_users": 0}, "num_users"),
        ({"days": 0}, "days"),
        ({"requests_per_user_day": 0}, "requests_per_user_day"),
        ({"num_notes": FEWEST_NOTES - 1}, f"num_notes must be at least {FEWEST_NOTES}"),
        ({"start": datetime(2022, 4, 25)}, "start needs a zone"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        simulate(**{**SMALL, **wrong})


def test_a_later_start_moves_the_whole_history():
    early, late = (simulate(num_users=50, num_notes=100, days=1, start=day) for day in (START, START + timedelta(days=30)))
    assert pc.min(late.events["event_ts"]).as_py() - pc.min(early.events["event_ts"]).as_py() == timedelta(days=30)


def test_a_data_set_refuses_events_out_of_order_and_other_columns(simulated):
    dataset, _ = simulated
    backwards = dataset.events.take(list(range(len(dataset.events)))[::-1])
    with pytest.raises(ValueError, match="sorted by landed_at"):
        Dataset("wrong", backwards, dataset.notes, dataset.users, "")
    with pytest.raises(ValueError, match="notes must have the schema"):
        Dataset("wrong", dataset.events, dataset.users, dataset.users, "")
