"""One furnished home and one server per test run; each test uses readers of its own."""

import dataclasses

import pytest

from serving.app import create_app
from serving.settings import Settings
from tests.serving.hand_made import START, furnish, running, until_ready
from warehouse.clock import ManualClock
from warehouse.home import Home
from warehouse.time_algebra import DAY_US, HOUR_US

DAYS = 4


@pytest.fixture(scope="session")
def clock():
    """Stands an hour after the history ends; tests only ever move it on."""
    return ManualClock(round(START.timestamp()) * 1_000_000 + DAYS * DAY_US + HOUR_US)


@pytest.fixture(scope="session")
def server(clock, tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("home"))
    furnish(home, num_users=300, num_notes=800, days=DAYS)
    limits = {
        "trending": 60,
        "fresh": 40,
        "item_to_item": 60,
        "two_tower": 60,
        "followed_authors": 40,
        "topics": 40,
        "nearby": 40,
    }
    settings = dataclasses.replace(
        Settings.load(), generators=limits, l1_top_k=100, logged_share=1.0, diversity="none", deadline_ms=60_000.0
    )
    with running(create_app(home, clock, settings)) as server:
        until_ready(server)
        server.wait_for_tick()
        yield server


@pytest.fixture(scope="session")
def readers(server):
    """The readers with the longest past, longest first."""
    return [user_id for user_id, _ in server.engine.world.readers.most_active(30)]


@pytest.fixture
def small_home(tmp_path):
    """A home of one day, for a server in a process of its own."""
    home = Home(tmp_path / "home")
    furnish(home, num_users=180, num_notes=120, days=1)
    return home
