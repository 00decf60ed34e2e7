import json
from dataclasses import replace

import numpy as np
import pytest

from models_ml import cli, configuration, evaluate_cli, evaluation, floor, item_to_item, l1, l2, metrics, train, two_tower
from models_ml.floor import FloorConfig
from models_ml.registry import Registry
from warehouse.errors import HeadraceError

SMALL_FLOOR = FloorConfig(trees=20, least_rows=20)


def test_the_floor_repeats_itself_and_reads_nothing_of_the_test_days(loaded, other_future):
    first = floor.predict_test(loaded, SMALL_FLOOR, 0, lambda done, total: None, threads=1)
    again = floor.predict_test(loaded, SMALL_FLOOR, 0, lambda done, total: None, threads=1)
    assert np.array_equal(first["click"], again["click"])
    assert metrics.auc(loaded.labels["click"][loaded.test_rows], first["click"]) > 0.6
    # other labels after test_start, same features: the trees must not change
    same_features = replace(other_future, values_RF=loaded.values_RF)
    assert np.array_equal(
        first["click"], floor.predict_test(same_features, SMALL_FLOOR, 0, lambda done, total: None, threads=1)["click"]
    )


@pytest.fixture(scope="module")
def home(export, tmp_path_factory):
    """A Headrace home after `headrace train all --epochs 1`."""
    path = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_HOME", str(path))
        assert cli.main(["train", "all", "--epochs", "1", "--export", str(export)]) == 0
    return path


def test_train_all_publishes_four_models_that_load(home, loaded):
    registry = Registry(home / "models")
    for name, room in (("item_to_item", item_to_item), ("two_tower", two_tower), ("l1", l1), ("l2", l2)):
        assert room.load(registry.path(name)) is not None
        manifest = registry.manifest(name)
        assert manifest["training_sha256"] == loaded.fingerprint()
        assert manifest["metrics"]
    assert tuple(registry.manifest("l2")["note_features"]) == loaded.note_features


def test_the_report_says_what_was_measured_on_what(home):
    report = json.loads((home / "models" / "report.json").read_text())
    assert report["rows"]["train"] + report["rows"]["test"] == 4000
    assert report["protocol"].startswith("synthetic: train on the ")
    assert set(report["ranking"]) == {"l1", "l2", "floor"}
    by_chance = [
        (model, head)
        for model, heads in report["ranking"].items()
        for head, values in heads.items()
        if values["auc_low"] <= 0.5
    ]
    assert [(model, head) for model, heads in report["not_learned"].items() for head in heads] == by_chance
    assert ("l2", "click") not in by_chance
    for heads in report["ranking"].values():
        for values in heads.values():
            assert values["auc_low"] < values["auc"] < values["auc_high"]
            assert {"auc", "nce", "log_loss", "ndcg@10", "ece", "grouped_auc", "relative_calibration"} <= set(values)
    assert set(report["retrieval"]) == {"popularity", "item_to_item", "two_tower"}
    assert set(report["index_recall"]) == {"exact bf16", "exact int8", "HNSW bf16", "HNSW int8"}
    assert Registry(home / "models").manifest("two_tower")["index_recall"] == report["index_recall"]
    assert set(report["l2_over_floor"]) == {"click", "long_view"}
    assert set(report["seconds"]) == {"item_to_item", "two_tower", "l1", "l2", "floor"}


def test_a_generator_is_evaluated_as_its_training_reported(home, export, loaded, monkeypatch, capsys):
    monkeypatch.setenv("HEADRACE_HOME", str(home))
    expected = json.loads((home / "models" / "report.json").read_text())["retrieval"]
    for name in ("item_to_item", "two_tower"):
        assert evaluate_cli.main(["evaluate", "--model", f"{name}@0001", "--json", "--export", str(export)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["retrieval"] == {"popularity": expected["popularity"], name: expected[name]}
        assert found["trained_on_this_export"] is True
    assert evaluate_cli.main(["evaluate", "--model", "two_tower", "--export", str(export)]) == 0
    assert "recall@500" in capsys.readouterr().out
    fewer = evaluation.RetrievalQueries(replace(loaded, notes=loaded.notes.slice(1)))
    with pytest.raises(HeadraceError, match=r"two_tower knows .* notes, the export has"):
        fewer.two_tower(two_tower.load(Registry(home / "models").path("two_tower")))


def test_training_one_model_again_changes_nothing_else(home, export, monkeypatch, capsys):
    monkeypatch.setenv("HEADRACE_HOME", str(home))
    registry = Registry(home / "models")
    before = json.loads((home / "models" / "report.json").read_text())
    assert cli.main(["train", "l1", "--epochs", "1", "--json", "--export", str(export)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"] == before["versions"]  # the same content is the same version
    assert report["ranking"] == before["ranking"]
    assert report["l2_over_floor"] == before["l2_over_floor"]
    assert registry.versions("l1") == [before["versions"]["l1"]]


def test_another_seed_is_another_version_and_moves_the_alias(home, export, monkeypatch, capsys):
    monkeypatch.setenv("HEADRACE_HOME", str(home))
    registry = Registry(home / "models")
    before = registry.resolve("l1")
    assert cli.main(["train", "l1", "--epochs", "1", "--seed", "5", "--export", str(export)]) == 0
    assert registry.resolve("l1") != before
    assert registry.path("l1", before).is_dir()
    assert "Ranking on the test days" in capsys.readouterr().out


def test_a_report_without_positive_test_rows_has_null_where_a_metric_is_undefined(loaded, tmp_path):
    labels = {name: np.where(loaded.is_train, label_R, 0).astype(np.float32) for name, label_R in loaded.labels.items()}
    configs = configuration.Configs(l1=l1.L1Config(epochs=1))
    quiet = replace(loaded, labels=labels)
    report = train.train(quiet, ["l1"], configs, 0, Registry(tmp_path), lambda name, done, total: None)
    assert report["ranking"]["l1"]["click"]["auc"] is None
    positives = int(loaded.labels["click"][loaded.train_rows].sum())
    assert report["not_learned"]["l1"]["click"] == {"positives_train": positives, "positives_test": 0}
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_no_export_is_said_in_words(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    with pytest.raises(HeadraceError, match="run `headrace export-training` first"):
        cli.main(["train", "all"])
    with pytest.raises(HeadraceError, match="--epochs must be at least 1, got 0"):
        cli.main(["train", "l2", "--epochs", "0"])
