"""A lake of its own for every test."""

import pytest

from warehouse.home import Home
from warehouse.lake import Lake


@pytest.fixture
def home(tmp_path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def lake(home) -> Lake:
    return Lake.open(home)
