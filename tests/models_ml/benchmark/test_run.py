"""`headrace benchmark` on a file nobody has named."""

import json

import pytest
import torch

from models_ml.benchmark import cli, protocol
from models_ml.benchmark.published import SETS
from warehouse.errors import HeadraceError


@pytest.fixture
def benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))

    def run(*words: str) -> str:
        assert cli.main(["benchmark", *words, "--threads", "1"]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def file(tmp_path, round_and_round):
    lines = [" ".join([f"u{user}", *map(str, round_and_round.of(user))]) for user in range(round_and_round.num_users)]
    path = tmp_path / "circle.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_every_member_and_their_blend_are_reported_over_seeds(benchmark, file):
    report = json.loads(benchmark(str(file), "--seeds", "2", "--epochs", "1", "--json"))
    assert report["protocol"] == protocol.RULES
    assert (report["num_users"], report["num_items"], report["published"]) == (80, 40, [])
    by_model = report["models"]
    assert set(by_model) == {
        "popular", "directed", "directed, chosen", "linear", "transformer", "blend", "blend, refreshed",
        "blend, all seeds", "blend, refreshed, all seeds",
    }  # fmt: skip
    assert len(by_model["transformer"]["runs"]) == len(by_model["blend"]["runs"]) == 2
    assert by_model["transformer"]["hr@10"] == pytest.approx(sum(run["hr@10"] for run in by_model["transformer"]["runs"]) / 2)
    assert by_model["blend"]["hr@10"] > by_model["popular"]["hr@10"]
    assert all(0 < value <= 1 for value in by_model["transformer"]["validation"])


def test_what_another_machine_trained_is_blended_without_training_again(benchmark, file, tmp_path):
    words = [str(file), "--large", "--setting", "width=16", "--setting", "length=8", "--epochs", "2"]
    alone = json.loads(benchmark(*words, "--model", "transformer", "--json", "--out", str(tmp_path / "report.json")))
    assert json.loads((tmp_path / "report.json").read_text()) == alone
    assert alone["transformer"]["network"]["layers"] == 4
    [weights] = (tmp_path / "home" / "benchmark").iterdir()
    before = weights.read_bytes()
    both = json.loads(benchmark(*words, "--json"))
    assert both["models"]["transformer"]["runs"] == alone["models"]["transformer"]["runs"]
    assert weights.read_bytes() == before


def test_a_table_names_the_floor_and_the_rules(benchmark, file):
    text = benchmark(str(file), "--model", "directed")
    assert "directed (the floor)" in text
    assert "items tied with the target stand before it" in text
    assert "transformer" not in text


def test_what_cannot_be_run_is_said_in_words(benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADRACE_DATA", str(tmp_path / "nothing"))
    with pytest.raises(HeadraceError, match="point HEADRACE_DATA at the folder that holds sequences/beauty"):
        benchmark("beauty")
    with pytest.raises(HeadraceError, match=f"is neither a set .{', '.join(SETS)}. nor a file or folder"):
        benchmark(str(tmp_path / "mars.txt"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HeadraceError, match="torch sees no GPU here"):
        benchmark("lastfm", "--device", "cuda")
    with pytest.raises(HeadraceError, match="--seeds must be at least 1, got 0"):
        benchmark("beauty", "--seeds", "0")
