"""`serve --awake`: what is asked of the kernel is what the kernel says it was asked, and a refusal is said in words."""

import os
import struct

import pytest

from serving import awake, cli
from tests.serving.hand_made import free_port
from warehouse.errors import HeadraceError


def wakes_within_us() -> int:
    """How soon all cores have to be awake, by whoever asks the most of them."""
    return struct.unpack("i", awake.WITHIN.read_bytes())[0]


@pytest.fixture
def usual_us():
    if not os.access(awake.WITHIN, os.R_OK | os.W_OK):
        pytest.skip(f"needs {awake.WITHIN}, which root may write on Linux")
    if (usual := wakes_within_us()) == 0:
        pytest.skip("somebody keeps the cores awake already")
    return usual


def test_cores_stay_awake_while_it_serves_and_no_longer(usual_us, monkeypatch):
    said = []

    def serve(arguments):
        said.append(wakes_within_us())
        raise HeadraceError("ends")

    monkeypatch.setattr(cli, "_serve_until_stopped", serve)
    for words in (["--awake"], []):
        with pytest.raises(HeadraceError, match="ends"):
            cli.main(["serve", "--port", str(free_port()), *words])
    assert said == [0, usual_us]
    assert wakes_within_us() == usual_us


def test_a_refusal_is_said_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(awake, "WITHIN", tmp_path / "nowhere" / "cpu_dma_latency")
    monkeypatch.setattr(cli, "_serve_until_stopped", lambda arguments: pytest.fail("served all the same"))
    with pytest.raises(HeadraceError, match=r"cannot keep the cores awake: .*cpu_dma_latency: .*Leave --awake out"):
        cli.main(["serve", "--port", str(free_port()), "--awake"])
