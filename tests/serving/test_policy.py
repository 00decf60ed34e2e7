"""The page's rules one by one, and together on random candidates."""

import dataclasses
from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.placing import as_relevance, invert_cholesky
from serving.policy import (
    AUTHOR_CAP_RELAXED,
    COLD_START,
    EXPLORATION,
    PROMOTED,
    RANKED,
    SLOTS,
    TOPIC_CAP_RELAXED,
    Pool,
    Rules,
    arrange,
    arrange_best,
)
from tests.serving import plain_page


def codes(names) -> np.ndarray:
    """One number per name, -1 for None."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(name for name in names if name is not None))}
    return np.array([numbers.get(name, -1) for name in names], dtype=np.int64)


def pool_of(number, authors=None, topics=None, note_ids=None, vectors=None, blocked=(), promoted=(), cold=()) -> Pool:
    """Candidates with falling scores."""

    def mask(places):
        return np.isin(np.arange(number), list(places))

    return Pool(
        note_S=codes(note_ids or range(number)),
        author_S=codes(authors or [None] * number),
        topic_S=codes(topics or [None] * number),
        relevance_S=np.linspace(1.0, 0.0, number),
        vectors_VD=np.zeros((number, 2), np.float32) if vectors is None else np.asarray(vectors, np.float32),
        vector_S=np.arange(number),
        may_show_S=~mask(blocked),
        is_promoted_S=mask(promoted),
        is_cold_S=mask(cold),
    )


def places(pool: Pool, page_size: int, rules: Rules, seed: int = 0) -> tuple[list[int], list[str]]:
    placed, relaxed = arrange(pool, page_size, rules, Random(seed))
    return [item.candidate for item in placed], relaxed


def test_the_third_note_of_an_author_waits_for_the_next_authors():
    assert places(pool_of(5, authors=["a", "a", "a", "b", "c"]), 4, Rules(max_notes_per_author=2)) == ([0, 1, 3, 4], [])


def test_the_author_cap_gives_way_before_the_page_stays_short():
    page, relaxed = places(pool_of(4, authors=["a", "a", "a", "b"]), 4, Rules(max_notes_per_author=1))
    assert (page, relaxed) == ([0, 3, 1, 2], [AUTHOR_CAP_RELAXED])


def test_the_topic_cap_gives_way_before_the_author_cap():
    pool = pool_of(4, authors=["a", "b", "c", "a"], topics=["x", "x", "x", "y"])
    rules = Rules(max_notes_per_author=1, max_notes_per_topic=1)
    assert places(pool, 3, rules) == ([0, 1, 2], [TOPIC_CAP_RELAXED])
    assert places(pool, 4, rules) == ([0, 1, 2, 3], [TOPIC_CAP_RELAXED, AUTHOR_CAP_RELAXED])


def test_notes_without_an_author_have_no_cap_and_a_note_is_shown_once():
    assert places(pool_of(4, note_ids=["n0", "n0", "n1", "n2"]), 3, Rules(max_notes_per_author=1)) == ([0, 2, 3], [])


def test_what_is_blocked_is_not_shown_even_on_a_short_page():
    assert places(pool_of(3, blocked=[0, 2]), 3, Rules(max_notes_per_author=1)) == ([1], [])


@pytest.mark.parametrize("number", [0, 1])
def test_fewer_candidates_than_places_is_a_short_page(number):
    assert places(pool_of(number), 20, Rules(diversity="ssd", diversity_strength=1.0, diversity_window=3)) == (
        list(range(number)),
        [],
    )


@pytest.mark.parametrize("method", ["ssd", "mmr"])
def test_a_note_unlike_the_last_goes_before_one_that_repeats_it(method):
    vectors = [[1, 0], [1, 0], [0, 1], [1, 0]]
    rules = Rules(diversity=method, diversity_strength=1.0, diversity_window=2, max_displacement=3)
    assert places(pool_of(4, vectors=vectors), 3, rules)[0] == [0, 2, 1]


@pytest.mark.parametrize("method", ["ssd", "mmr"])
def test_without_strength_the_order_is_that_of_the_scores(method):
    rules = Rules(diversity=method, diversity_strength=0.0, diversity_window=5, max_displacement=9)
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(9, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert places(pool_of(9, vectors=vectors), 9, rules)[0] == list(range(9))


def test_the_volume_of_the_window_is_the_root_of_its_gram_determinant():
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(8, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    gains = plain_page.sliding_spectrum(np.zeros(8), vectors, strength=1.0, window=4)([0, 1, 2, 3], np.arange(4, 8))
    for gain, candidate in zip(gains, range(4, 8), strict=True):
        spanned = vectors[[1, 2, 3, candidate]]
        assert gain == pytest.approx(np.sqrt(np.linalg.det(spanned @ spanned.T)))
        inverse = np.empty((4, 4))
        assert invert_cholesky(spanned @ spanned.T, inverse) == pytest.approx(gain)
        np.testing.assert_allclose(inverse, np.linalg.inv(np.linalg.cholesky(spanned @ spanned.T)), atol=1e-9)


def test_a_vector_in_the_span_of_others_makes_no_volume():
    vectors = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.6, 0.8, 0.0]])
    assert invert_cholesky(vectors @ vectors.T, np.empty((3, 3))) == 0.0


@pytest.mark.parametrize("method", ["ssd", "mmr"])
def test_a_note_without_a_vector_is_like_no_other(method):
    pool = pool_of(3, vectors=[[1.0, 0.0], [0.6, 0.8], [0.0, 0.0]])
    pool = dataclasses.replace(pool, relevance_S=np.array([1.0, 0.1, 0.0]))
    rules = Rules(diversity=method, diversity_strength=1.0, diversity_window=3, max_displacement=3)
    assert places(pool, 3, rules)[0] == [0, 2, 1]  # 0 + 1 or 0 - 0, against 0.1 + 0.8 or 0.1 - 0.6
    without = dataclasses.replace(pool, vector_S=np.array([0, 1, -1]))
    assert places(without, 3, rules)[0] == [0, 2, 1]


def test_slots_take_the_best_note_that_fits_and_are_ranked_places_otherwise():
    rules = Rules(slots={0: PROMOTED, 2: COLD_START, 3: PROMOTED})
    placed, _ = arrange(pool_of(6, promoted=[4], cold=[3, 5]), 5, rules, Random(0))
    assert [item.candidate for item in placed] == [4, 0, 3, 1, 2]
    assert [item.slot for item in placed] == [PROMOTED, RANKED, COLD_START, RANKED, RANKED]
    assert {item.propensity for item in placed} == {1.0}


def test_a_logged_propensity_is_how_often_the_note_takes_the_place():
    pool, rules = pool_of(5, blocked=[3]), Rules(slots={1: EXPLORATION}, exploration_share=0.4)
    shown, told = Counter(), {}
    for seed in range(4000):
        placed, _ = arrange(pool, 3, rules, Random(seed))
        shown[placed[1].candidate] += 1
        assert told.setdefault(placed[1].candidate, placed[1].propensity) == placed[1].propensity
    assert told == pytest.approx({1: 0.6 + 0.4 / 3, 2: 0.4 / 3, 4: 0.4 / 3})
    for candidate, propensity in told.items():
        assert shown[candidate] / 4000 == pytest.approx(propensity, abs=5 * np.sqrt(0.25 / 4000))


def test_the_same_seed_explores_the_same_way():
    pool, rules = pool_of(50), Rules(slots={4: EXPLORATION, 9: EXPLORATION}, exploration_share=1.0)
    assert arrange(pool, 20, rules, Random(7)) == arrange(pool, 20, rules, Random(7))
    assert arrange(pool, 20, rules, Random(7)) != arrange(pool, 20, rules, Random(8))


def drawn(seed: int, most: int = 60) -> tuple[Pool, int, Rules]:
    """A pool, the size of a page and rules, such that every rule often matters."""
    random, rng = Random(seed), np.random.default_rng(seed)
    number, page_size = random.randrange(most), random.randrange(1, 25)
    vectors = rng.normal(size=(number + 1, 4)) * (rng.random((number + 1, 1)) < 0.9)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    pool = Pool(
        note_S=codes([random.randrange(max(1, number - 5)) for _ in range(number)]),
        author_S=codes([random.choice(["a", "b", "c", "d", None]) for _ in range(number)]),
        topic_S=codes([random.choice(["x", "y", None]) for _ in range(number)]),
        relevance_S=as_relevance(np.sort(rng.choice([0.1, 0.5, 0.9, np.nan], number) + rng.normal(size=number))[::-1].copy()),
        vectors_VD=vectors.astype(np.float32),
        vector_S=np.where(rng.random(number) < 0.9, rng.permutation(number), -1),
        may_show_S=rng.random(number) < 0.9,
        is_promoted_S=rng.random(number) < 0.1,
        is_cold_S=rng.random(number) < 0.1,
    )
    rules = Rules(
        max_notes_per_author=random.choice([0, 0, 1, 3]),
        max_notes_per_topic=random.choice([0, 0, 1, 5]),
        diversity=random.choice(["none", "ssd", "mmr"]),
        diversity_strength=random.choice([0.0, 0.2, 5.0]),
        diversity_window=random.randrange(6),
        max_displacement=random.choice([0, 2, 10, 100]),
        slots={random.randrange(25): random.choice(SLOTS) for _ in range(random.choice([0, 0, 3]))},
        exploration_share=random.random(),
    )
    return pool, page_size, rules


@settings(max_examples=800)
@given(seed=st.integers(0, 2**32))
def test_the_compiled_page_is_the_plain_one(seed):
    pool, page_size, rules = drawn(seed)
    assert arrange(pool, page_size, rules, Random(seed)) == plain_page.arrange(pool, page_size, rules, Random(seed))


@settings(max_examples=300)
@given(seed=st.integers(0, 2**32))
def test_a_page_of_the_head_is_the_page_of_all(seed):
    pool, page_size, rules = drawn(seed, most=300)
    looked_at = []

    def head_of(size):
        looked_at.append(size)
        rows = {field.name: getattr(pool, field.name)[:size] for field in dataclasses.fields(pool)}
        return Pool(**{**rows, "vectors_VD": pool.vectors_VD})

    notes = np.unique(pool.note_S, return_index=True)[1]
    pool = dataclasses.replace(
        pool, note_S=np.arange(len(pool)), may_show_S=pool.may_show_S & np.isin(np.arange(len(pool)), notes)
    )
    assert arrange_best(head_of, len(pool), page_size, rules, Random(seed)) == arrange(pool, page_size, rules, Random(seed))
    if not rules.slots and not rules.max_notes_per_author and not rules.max_notes_per_topic and rules.max_displacement < 10:
        assert looked_at[0] == 2 * (page_size + rules.max_displacement)


@pytest.mark.parametrize("scores", [[], [np.nan, np.nan], [3.0, 3.0, np.inf], [5.0, 4.0, np.nan, 1.0, -np.inf]])
def test_relevance_lies_between_0_and_1(scores):
    scores_S = np.array(scores, float)
    np.testing.assert_array_equal(as_relevance(scores_S), plain_page.as_relevance(scores_S))


def test_equal_notes_stand_in_the_order_they_came_in():
    pool = pool_of(40, vectors=[[0.6, 0.8]] * 40)
    rules = Rules(diversity="mmr", diversity_strength=0.5, diversity_window=3, max_displacement=9)
    assert places(dataclasses.replace(pool, relevance_S=np.zeros(40)), 20, rules)[0] == list(range(20))


@settings(max_examples=600)
@given(seed=st.integers(0, 2**32))
def test_every_page_keeps_every_rule(seed):
    pool, page_size, rules = drawn(seed)
    placed, relaxed = arrange(pool, page_size, rules, Random(seed))

    shown = [item.candidate for item in placed]
    first = {note: place for place, note in reversed(list(enumerate(pool.note_S.tolist())))}
    showable = [place for place in first.values() if pool.may_show_S[place]]
    assert set(shown) <= set(showable)
    assert len(shown) == len(set(shown)) == min(page_size, len(showable))
    assert all(0.0 < item.propensity <= 1.0 for item in placed)
    assert all(item.slot in (RANKED, rules.slots.get(place)) for place, item in enumerate(placed))
    for cap, names, rule in (
        (rules.max_notes_per_author, pool.author_S.tolist(), AUTHOR_CAP_RELAXED),
        (rules.max_notes_per_topic, pool.topic_S.tolist(), TOPIC_CAP_RELAXED),
    ):
        most = max(Counter(names[place] for place in shown if names[place] >= 0).values(), default=0)
        assert cap == 0 or most <= cap or rule in relaxed
    if not rules.slots and not rules.max_notes_per_author and not rules.max_notes_per_topic:
        rank = {place: at for at, place in enumerate(sorted(showable))}
        assert all(abs(rank[candidate] - place) <= rules.max_displacement for place, candidate in enumerate(shown))
