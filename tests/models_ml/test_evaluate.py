"""`headrace evaluate` on a published model, and on what a forward log says was served."""

import json
import re

import numpy as np
import pyarrow as pa
import pytest

from models_ml import bootstrap, evaluate_cli, evaluation, examples, l1, metrics, plots
from models_ml.l1 import L1Config
from models_ml.registry import Registry
from warehouse.errors import HeadraceError
from warehouse.home import Home
from warehouse.lake import Lake


@pytest.fixture(scope="module")
def published(export, tmp_path_factory):
    """(home, version) with one small L1."""
    home, loaded = tmp_path_factory.mktemp("home"), examples.load(export)
    model = l1.train(loaded, L1Config(epochs=1), 0, lambda done, total: None)
    registry = Registry(home / "models")
    version = registry.publish("l1", model.to_files(), {"training_sha256": loaded.fingerprint()})
    registry.set_alias("l1", "production", version)
    return home, version


@pytest.fixture
def evaluate(published, export, monkeypatch, capsys):
    monkeypatch.setenv("HEADRACE_HOME", str(published[0]))

    def run(*words: str) -> str:
        assert evaluate_cli.main(["evaluate", *words, "--export", str(export)]) == 0
        return capsys.readouterr().out

    return run


def test_a_model_is_judged_under_the_protocol_by_head_and_by_slice(evaluate, published, loaded):
    report = json.loads(evaluate("--model", f"l1@{published[1]}", "--slice", "new_user,surface", "--json"))
    assert report["model"] == f"l1@{published[1]}"
    assert report["protocol"] == loaded.protocol()
    assert report["rules"] == evaluation.RANKING_RULES
    assert report["trained_on_this_export"] is True
    model = l1.load(Registry(published[0] / "models").path("l1"))
    clicks, scores = loaded.labels["click"][loaded.test_rows], model.score_rows(loaded, loaded.test_rows)["click"]
    assert report["heads"]["click"]["auc"] == pytest.approx(metrics.auc(clicks, scores))
    assert report["heads"]["click"]["auc_low"] < report["heads"]["click"]["auc"] < report["heads"]["click"]["auc_high"]
    intervals = {name.removesuffix("_low") for name in report["heads"]["click"] if name.endswith("_low")}
    assert set(evaluate_cli.COLUMNS) - intervals == {"coverage@10"}
    without = json.loads(evaluate("--model", "l1", "--slice", "new_user,surface", "--bootstrap", "0", "--json"))
    assert without["heads"]["click"] == {
        name: value for name, value in report["heads"]["click"].items() if not name.endswith(("_low", "_high"))
    }
    for parts in report["slices"].values():
        assert sum(heads["click"]["num_rows"] for heads in parts.values()) == len(loaded.test_rows)
    surface = np.array(loaded.words["surface"].to_pylist())[loaded.test_rows] == "tab_0"
    expected = metrics.log_loss(clicks[surface], scores[surface])
    assert report["slices"]["surface"]["tab_0"]["click"]["log_loss"] == pytest.approx(expected)


def test_pictures_hold_a_dot_a_bin_and_a_line_a_part(evaluate, tmp_path):
    text = evaluate("--model", "l1", "--slice", "new_user", "--plots", str(tmp_path / "pictures"))
    assert "AUC by new_user" in text
    reliability = (tmp_path / "pictures" / "reliability-click.svg").read_text()
    assert (reliability.count("<circle"), reliability.count(plots._BLUE)) == (15, 30)  # each with the line of its interval
    drawn = (tmp_path / "pictures" / "slice-new_user-click.svg").read_text()
    assert drawn.count("<circle") == 2
    assert re.search(r"yes \(\d", drawn)


def test_an_unknown_slice_model_or_version_is_answered_with_those_there_are(evaluate):
    with pytest.raises(HeadraceError, match="no slice 'planet'; there are new_user, surface"):
        evaluate("--model", "l1", "--slice", "planet")
    with pytest.raises(HeadraceError, match="evaluate knows l1, l2, item_to_item, two_tower"):
        evaluate("--model", "floor")
    with pytest.raises(HeadraceError, match="--slice and --plots are of heads, which two_tower has not"):
        evaluate("--model", "two_tower", "--slice", "surface")
    with pytest.raises(HeadraceError, match=r"/proc/none/reliability-click.svg cannot be written: No such file"):
        evaluate("--model", "l1@0001", "--plots", "/proc/none")
    with pytest.raises(HeadraceError, match="has no version"):
        evaluate("--model", "l1@0009-0123456789ab")
    with pytest.raises(HeadraceError, match="--bootstrap must be at least 0, got -1"):
        evaluate("--model", "l1", "--bootstrap", "-1")


def test_what_was_served_is_judged_from_the_forward_log_and_the_events(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    with pytest.raises(HeadraceError, match="nothing was served yet"):
        evaluate_cli.main(["evaluate", "--served", "click"])
    lake, rng, start_us = Lake.open(Home.from_env()), np.random.default_rng(0), 1_767_261_600_000_000
    scores, clicks = rng.random((50, 4)), rng.random((50, 4)) < 0.4
    instant = pa.timestamp("us", "UTC")
    candidate = pa.struct(
        {
            "impression_id": pa.string(),
            "note_id": pa.string(),
            "shown": pa.bool_(),
            "predictions": pa.map_(pa.string(), pa.float64()),
        }
    )
    log = pa.table(
        {
            "user_id": [f"u{request % 7}" for request in range(50)],
            "request_ts": pa.array([start_us + request * 1_000_000 for request in range(50)], instant),
            "candidates": pa.array(
                [
                    [
                        {
                            "impression_id": f"{request}-{place}",
                            "note_id": f"n{place}",
                            "shown": True,
                            "predictions": [("click", scores[request, place])],
                        }
                        for place in range(4)
                    ]
                    for request in range(50)
                ],
                pa.list_(candidate),
            ),
        }
    )
    acted = [f"{request}-{place}" for request, place in zip(*np.nonzero(clicks), strict=True)]
    late_us = start_us + 7_200_000_000
    events = pa.table(
        {
            "impression_id": [*acted, "0-0"],
            "event_type": ["click"] * len(acted) + ["like"],
            "event_ts": pa.array([start_us + 60_000_000] * len(acted) + [late_us], instant),
        }
    )
    for name, rows in (("lake.forward_log", log), ("lake.events", events)):
        lake.create(name, rows.schema)
        lake.append(name, rows)
    assert evaluate_cli.main(["evaluate", "--served", "click", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["heads"]["click"]
    assert found["num_rows"] == 200
    assert found["auc"] == pytest.approx(metrics.auc(clicks.ravel(), scores.ravel()))
    readers = np.repeat([request % 7 for request in range(50)], 4)
    assert found["ndcg@10"] == pytest.approx(metrics.ndcg(clicks.ravel(), scores.ravel(), readers, 10))
    interval = bootstrap.of_head(clicks.ravel(), scores.ravel(), readers, clicks.mean(), 10)["ndcg@10"]
    assert (found["ndcg@10_low"], found["ndcg@10_high"]) == pytest.approx((interval.low, interval.high))
