import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.policy import AUTHOR_CAP_RELAXED, arrange


def test_the_third_note_of_an_author_waits_for_the_next_authors():
    page, relaxed = arrange(np.arange(5), ["n0", "n1", "n2", "n3", "n4"], ["a", "a", "a", "b", "c"], 4, 2)
    assert page == [0, 1, 3, 4]
    assert relaxed == []


def test_the_author_cap_gives_way_before_the_page_stays_short():
    page, relaxed = arrange(np.arange(4), ["n0", "n1", "n2", "n3"], ["a", "a", "a", "b"], 4, 1)
    assert page == [0, 3, 1, 2]
    assert relaxed == [AUTHOR_CAP_RELAXED]


def test_notes_without_an_author_have_no_cap_and_a_note_is_shown_once():
    page, relaxed = arrange(np.arange(4), ["n0", "n0", "n1", "n2"], [None, None, None, None], 3, 1)
    assert page == [0, 2, 3]
    assert relaxed == []


@pytest.mark.parametrize("candidates", [[], [0]])
def test_fewer_candidates_than_places_is_a_short_page(candidates):
    assert arrange(np.array(candidates, int), ["n0"], ["a"], 20, 2) == (candidates, [])


@given(
    authors=st.lists(st.sampled_from(["a", "b", "c", None]), max_size=40),
    page_size=st.integers(1, 25),
    cap=st.integers(0, 3),
)
def test_the_page_is_full_without_repeats_and_capped_unless_it_says_so(authors, page_size, cap):
    note_ids = [f"n{place // 2}" for place in range(len(authors))]  # every second note is a repeat
    page, relaxed = arrange(np.arange(len(authors)), note_ids, authors, page_size, cap)
    shown = [note_ids[place] for place in page]
    assert len(shown) == len(set(shown)) == min(page_size, len(set(note_ids)))
    counts = [sum(authors[place] == author for place in page) for author in ("a", "b", "c")]
    assert relaxed or cap == 0 or max(counts) <= cap
