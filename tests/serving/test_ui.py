"""The page in a real browser: loaded from the server, clicked, and read back."""

import contextlib
import dataclasses
import re
import threading

import pytest

from serving.routes.page import API_PAGE, PAGE
from tests.serving.browser import CHROMIUM, browsing

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian package: chromium)")
NUM_ROWS = "document.querySelectorAll('#feed tbody tr').length"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as page:
        yield page
        assert page.problems == []


@contextlib.contextmanager
def moving(clock):
    """Lets the clock run, so that the page's next request comes after its event."""
    stop = threading.Event()

    def run():
        while not stop.wait(0.001):
            clock.advance_us(1)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    stop.set()
    thread.join()


@needs_chromium
def test_the_page_shows_the_feed_and_a_notes_features(server, readers, page):
    page.go(f"{server.base_url}/ui?user={readers[0]}&open=0")
    page.until(f"{NUM_ROWS} === 20 && document.querySelector('#note .features')")
    notes = server.feed(readers[0])["notes"]
    shown = page.run("[...document.querySelectorAll('#feed tbody tr')].map((row) => row.dataset.note)")
    assert shown == [note["noteId"] for note in notes]
    assert page.run("document.querySelectorAll('#feed tr[aria-selected=true]').length") == 1
    text = page.run("document.body.innerText")
    for part in (
        "note_num_views_7d",
        "user_num_clicks_7d",
        "watermark T",
        "known at K",
        "tick T",
        "position K",
        "total",
        "AUC",
    ):
        assert part in text
    for source in {source for note in notes for source in note["sources"]}:
        assert source.replace("_", " ") in text
    assert not re.search(r"\b(NaN|undefined|null)\b", text)


@needs_chromium
def test_a_like_pressed_on_the_page_changes_the_readers_features_at_once(server, clock, page):
    page.go(f"{server.base_url}/ui?user=presses-buttons&open=0")
    page.until("document.querySelector('#note .actions')")
    with moving(clock):
        page.run(
            "[...document.querySelectorAll('#note .actions button')].find((button) => button.textContent === 'like').click()"
        )
        page.until("document.querySelector('#user tr.changed')")
    changed = page.run("[...document.querySelectorAll('#user tr.changed td:first-child')].map((cell) => cell.textContent)")
    assert "user_num_likes_7d" in changed
    assert re.search(r"like \S+ → \d+:\d+", page.run("document.querySelector('#user').innerText"))
    assert "already count it" in page.run("document.querySelector('#message').textContent")


@needs_chromium
def test_places_that_are_kept_and_what_was_kept_from_before_are_shown(server, readers, page, monkeypatch):
    world = server.engine.world
    settings = dataclasses.replace(world.settings, cold_start_positions=[2], cold_start_hours=1e5)
    monkeypatch.setattr(server.engine, "world", dataclasses.replace(world, settings=settings))
    page.go(f"{server.base_url}/ui?user={readers[26]}&open=2")
    page.until(f"{NUM_ROWS} === 20 && document.querySelector('#note .features')")
    kept = "[...document.querySelectorAll('#feed tbody tr')].map((row) => row.querySelector('.slot')?.textContent ?? '')"
    assert page.run(kept) == ["", "", "cold start"] + 17 * [""]
    assert "cold start, propensity 1" in page.run("document.querySelector('#note').innerText")
    everything = "document.querySelector('#cached')?.innerText === 'kept from before: user, candidates, l1'"
    for _ in range(3):  # what a slow machine had no time to find is not kept
        page.run("document.querySelector('#controls').requestSubmit()")
        page.until("document.querySelector('#cached')")
        if page.run(everything):
            break
    page.until(everything)


@needs_chromium
def test_the_feed_can_be_used_from_the_keyboard_alone(server, page):
    page.go(f"{server.base_url}/ui?user=types-only")
    page.until(f"{NUM_ROWS} === 20")
    page.run("document.querySelectorAll('#feed button.note')[4].focus()")
    page.run("document.activeElement.click()")  # what Enter does to a focused button
    page.until("document.querySelector('#note .features')")
    assert page.run("document.querySelectorAll('#feed tbody tr')[4].getAttribute('aria-selected')") == "true"
    unlabelled = "[...document.querySelectorAll('input, select')].filter((field) => !field.labels.length).length"
    assert page.run(unlabelled) == 0


@needs_chromium
def test_a_request_can_be_sent_from_the_description_of_the_api(server, page):
    page.go(f"{server.base_url}/docs")
    page.until("document.querySelectorAll('details').length >= 10")
    page.run("window.feed = [...document.querySelectorAll('details')].find((one) => one.innerText.includes('/v1/feed'))")
    page.run("feed.open = true")
    page.run("feed.querySelector('button').click()")
    page.until("!feed.querySelector('pre').hidden")
    assert page.run("feed.querySelector('pre').textContent").startswith("200 in ")


@pytest.mark.parametrize("file", [PAGE, API_PAGE])
def test_a_page_needs_nothing_from_elsewhere(file):
    page = file.read_text()
    assert set(re.findall(r"https?://[^\s\"'<>]+", page)) == set()
    assert '<html lang="en">' in page
    assert "prefers-color-scheme: dark" in page
    assert 'aria-live="polite"' in page
    assert "innerHTML" not in page  # ids come from clients
