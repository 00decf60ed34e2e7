import json

import pytest

from models_ml import quality
from models_ml.benchmark.published import SETS
from models_ml.configuration import Configs
from models_ml.floor import FloorConfig
from models_ml.l2_network import L2Config
from warehouse.errors import HeadraceError
from warehouse.home import Home


def written(path, **kinds):
    path.write_text(json.dumps(kinds))
    return path


def test_the_gates_of_the_project_are_well_formed_and_cover_every_set():
    gates = quality.read(quality.GATES)
    assert {gate.subject for gate in gates} == {*SETS, quality.RANKING}


@pytest.mark.parametrize(
    ("bounds", "value", "passes"),
    [
        ({"at_least": 0.5, "tolerance": 0.0}, 0.5, True),
        ({"at_least": 0.5, "tolerance": 0.01}, 0.4905, True),
        ({"at_least": 0.5, "tolerance": 0.01}, 0.4895, False),
        ({"at_most": 0.02, "tolerance": 0.0}, 0.0201, False),
        ({"at_most": 0.02, "tolerance": 0.001}, 0.0209, True),
        ({"at_least": 0.0, "tolerance": 0.0}, float("nan"), False),
        ({"at_most": 0.0, "tolerance": 0.0}, float("nan"), False),
    ],
)
def test_a_gate_passes_up_to_its_tolerance_and_never_without_a_number(bounds, value, passes):
    assert quality.Gate(subject="beauty", metric="hr@10", runs=1, **bounds).passes(value) is passes


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"ranking": [{"metric": "m", "runs": 1, "tolerance": 0}]}, "ranking gate 1: needs one of at_least and at_most"),
        ({"ranking": [{"metric": "m", "runs": 1, "tolerance": 0, "at_leest": 1}]}, "ranking gate 1: needs metric, runs"),
        ({"benchmark": [{"set": "mars", "metric": "m", "runs": 1, "tolerance": 0, "at_least": 1}]}, "with a `set` of beauty"),
        ({"benchmark": [{"set": "beauty", "metric": "m", "runs": 0, "tolerance": 0, "at_least": 1}]}, "runs of at least 1"),
    ],
)
def test_a_malformed_gate_is_refused_with_its_number(tmp_path, kinds, message):
    with pytest.raises(HeadraceError, match=message):
        quality.read(written(tmp_path / "gates.json", **kinds))


def test_ranking_gates_read_the_report_of_a_training(export, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    home = Home.from_env()
    for file in export.iterdir():
        (home.exports / file.name).write_bytes(file.read_bytes())
    configs = Configs(l2=L2Config(epochs=1, width=8, hidden=16), floor=FloorConfig(trees=5))
    metrics = ("ranking.l2.click.ece", "l2_over_floor.click.low")
    gates = [quality.Gate(quality.RANKING, metric, 1, 0.0, at_least=-1.0) for metric in metrics]
    ece, low = quality.ranking_values(gates, lambda line: None, home, configs)
    assert 0 < ece < 1
    assert -1 < low < 1


def test_a_metric_that_the_report_lacks_is_answered_with_those_it_has():
    with pytest.raises(HeadraceError, match=r"no ranking\.l3; at 'l3' it has l2, floor"):
        quality.value_at({"ranking": {"l2": {}, "floor": {}}}, "ranking.l3")


def test_a_verdict_says_what_was_measured_and_what_was_asked():
    gate = quality.Gate("beauty", "hr@10", 3, 0.001, "blend", at_least=0.092)
    assert gate.verdict(0.0956) == "PASS  beauty blend hr@10 0.0956 (>= 0.092, tolerance 0.001; 3 runs)"
    assert gate.verdict(0.09).startswith("FAIL")


def test_what_cannot_be_asked_is_skipped_with_the_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    monkeypatch.setenv("HEADRACE_DATA", str(tmp_path / "nothing"))
    assert quality.main([]) == 0
    skipped = capsys.readouterr().out.splitlines()
    assert len(skipped) == 1 + len(SETS)
    assert all(line.startswith("SKIP") for line in skipped)
