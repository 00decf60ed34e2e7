"""`headrace workflow` without the stages that dbt does: what is skipped, what goes on, and what the gate decides."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from headrace.workflow import STATE, Workflow
from models_ml import configuration, gate, train
from models_ml.examples import load
from models_ml.floor import FloorConfig
from models_ml.l1 import L1Config
from models_ml.registry import Registry
from tests.end_to_end.stopping import leaves_nothing_behind
from tests.models_ml.synthetic import write_export
from warehouse.errors import HeadraceError
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import create_tables


def _workflow(tmp_path, config=None):
    return Workflow(Home(tmp_path), config, Console(quiet=True))


def test_a_stage_is_skipped_until_its_inputs_change(tmp_path):
    done = []
    inputs = {"snapshot": 1}
    for change, expected in (({}, 1), ({}, 1), ({"snapshot": 2}, 2), ({}, 2)):
        inputs.update(change)
        workflow = _workflow(tmp_path)
        workflow._stage("features", lambda: inputs, lambda: done.append(1))
        assert len(done) == expected
    assert json.loads((tmp_path / STATE).read_text())["features"].keys() == {"done", "seconds"}


def test_a_stage_that_was_cut_off_is_begun_again_and_told_so(tmp_path):
    def fail():
        raise HeadraceError("cut off")

    with pytest.raises(HeadraceError):
        _workflow(tmp_path)._stage("train", lambda: 1, fail)
    again = _workflow(tmp_path)
    seen = []
    again._stage("train", lambda: 1, lambda: seen.append(again._resume))
    other = _workflow(tmp_path)
    other._stage("train", lambda: 2, lambda: seen.append(other._resume))
    assert seen == [True, False]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A home with an export, L1 twice (the second one worse) and its report."""
    home = Home(tmp_path_factory.mktemp("home"))
    write_export(home.exports)
    examples, registry = load(home.exports), Registry(home.models)
    configs = configuration.Configs(l1=L1Config(hidden=16, epochs=6, batch_size=256), floor=FloorConfig(trees=5))
    report = train.train(examples, ["l1"], configs, 0, registry, lambda *_: None)
    worse = replace(configs, l1=replace(configs.l1, epochs=1, learning_rate=1e-5))
    options = train.Options(promote=False)
    return home, report, train.train(examples, ["l1"], worse, 0, registry, lambda *_: None, options)


def test_a_worse_candidate_stays_out_of_production(trained):
    home, good, bad = trained
    examples, registry = load(home.exports), Registry(home.models)
    verdicts = gate.judge(examples, bad, registry)
    assert {verdict.what.split(" AUC")[0] for verdict in verdicts} == {"l1 click", "l1 long_view"}
    assert not any(verdict.passed for verdict in verdicts)
    assert registry.resolve("l1") == good["versions"]["l1"]
    assert registry.resolve("l1", "candidate") == bad["versions"]["l1"]


def test_a_head_that_production_has_not_learned_is_not_compared(trained):
    home, _, bad = trained
    examples, registry = load(home.exports), Registry(home.models)
    by_chance = np.random.default_rng(0).permutation(examples.labels["click"])
    verdicts = gate.judge(replace(examples, labels=examples.labels | {"click": by_chance}), bad, registry)
    assert {verdict.what.split(" AUC")[0] for verdict in verdicts} == {"l1 long_view"}


def test_the_first_model_has_nothing_to_be_compared_with(trained, tmp_path):
    home, good, _ = trained
    assert gate.judge(load(home.exports), good, Registry(tmp_path)) == []


def test_publishing_moves_production_and_keeps_the_version_before(trained):
    home, good, bad = trained
    workflow = Workflow(home, None, Console(quiet=True))
    workflow.state = {"train": {"versions": bad["versions"]}, "gate": {"passed": True}}
    workflow._stage("publish", lambda: bad["versions"], workflow._publish)
    registry = Registry(home.models)
    assert (registry.resolve("l1"), registry.resolve("l1", "previous")) == (bad["versions"]["l1"], good["versions"]["l1"])


def test_a_workflow_that_is_told_to_stop_leaves_no_process_behind(tmp_path):
    create_tables(Lake.open(Home(tmp_path)))
    leaves_nothing_behind(tmp_path, "workflow")


def test_a_lake_without_events_is_said_in_words(tmp_path: Path):
    with pytest.raises(HeadraceError, match=r"the lake has no table lake.events.*; run `headrace land` first"):
        _workflow(tmp_path).run()
