"""What is done with published versions: exports that score as the server does, batch scores, vectors in the lake, aliases."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from models_ml import artefacts_cli, export, l1, l2, two_tower
from models_ml.l1 import L1Config
from models_ml.l2_network import L2Config
from models_ml.registry import Registry
from models_ml.two_tower import TwoTowerConfig
from warehouse.errors import HeadraceError
from warehouse.home import Home
from warehouse.lake import Lake

CONFIGS = {
    "l1": (l1, L1Config(hidden=16, epochs=1, batch_size=256)),
    "l2": (l2, L2Config(history_length=10, width=8, hidden=16, members=2, bins=4, epochs=1, batch_size=256)),
    "two_tower": (
        two_tower,
        TwoTowerConfig(width=8, history_length=10, epochs=1, batch_size=256, user_features=("user_*", "attributes")),
    ),
}


@pytest.fixture(scope="module")
def models(loaded):
    return {name: room.train(loaded, config, 0, lambda done, total: None) for name, (room, config) in CONFIGS.items()}


@pytest.fixture
def home(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    registry = Registry(tmp_path / "home" / "models")
    for name, model in models.items():
        registry.promote(name, registry.publish(name, model.to_files(), {}))
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("name", "form"), [("l1", "torchscript"), ("l2", "onnx"), ("l2", "torch"), ("l2", "torchscript"), ("two_tower", "onnx")]
)
def test_an_export_scores_as_the_server_does(name, form, models, loaded, tmp_path):
    path = tmp_path / f"model{export.FORMATS[form]}"
    parity = export.export(models[name], {"model": name}, loaded, form, path, 40)
    assert parity.most_difference <= 1e-5
    assert parity.same_top + parity.swapped_top == 40
    described = json.loads((tmp_path / f"{path.name}.json").read_text())
    assert described["parity"]["requests"] == 40
    assert described["outputs"] == (["reader_vector"] if name == "two_tower" else ["click", "long_view"])


def test_an_export_that_scores_otherwise_is_not_written(models, loaded, tmp_path):
    other = export.scorer_of(models["l1"].network)
    with torch.no_grad():
        other.network.last.bias[0] += 1e-3
    run = export.runner_of(export.content_of(other, "torchscript"), "torchscript", ("user", "surface", "features"))
    with pytest.raises(HeadraceError, match=r"request 0: a score differs by .* from the served one; 1e-05 is allowed"):
        export.check(models["l1"], run, loaded, 5)


def test_another_order_of_the_first_is_refused_though_scores_are_near(models, loaded, monkeypatch):
    # scores within the tolerance, but ranked by their reverse
    monkeypatch.setattr(export, "MOST_DIFFERENCE", 2.0)
    served = export.runner_of(
        export.content_of(export.scorer_of(models["l1"].network), "torchscript"), "torchscript", ("user", "surface", "features")
    )
    with pytest.raises(HeadraceError, match=r"its first 20 are not those that are served"):
        export.check(models["l1"], lambda inputs: 1 - served(inputs), loaded, 5)


def test_a_network_that_cannot_be_exported_is_not_trained(models):
    class Stubborn(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

    network = l1.L1Network(L1Config(), ("user_num_views_7d",), ("note_num_views_7d",), 1)
    export.dry_run(Stubborn(network))
    forward = network.forward
    network.forward = lambda *inputs: forward(*inputs) * (1 if float(inputs[0].sum()) > 0 else 2)  # a branch on data
    with pytest.raises(HeadraceError, match=r"L1Network cannot be exported, so it is not trained: "):
        export.dry_run(Stubborn(network))
    with pytest.raises(HeadraceError, match=r"L1Network|Linear"):
        export.dry_run(Stubborn(nn.Linear(1, 1)))


@pytest.mark.parametrize("name", ["l1", "l2", "two_tower"])
def test_batch_scores_equal_those_of_single_requests(name, models, loaded, home, export_folder, tmp_path, capsys):
    rows = np.arange(3000, 3040)
    spine = pq.read_table(export_folder / "examples.parquet").take(pa.array(rows))
    pq.write_table(spine, tmp_path / "spine.parquet")
    words = ["score", name, "--spine", str(tmp_path / "spine.parquet"), "--out", str(tmp_path / "out.parquet")]
    assert artefacts_cli.main([*words, "--export", str(export_folder)]) == 0
    assert "40 rows scored by" in capsys.readouterr().out
    scored = pq.read_table(tmp_path / "out.parquet")
    assert scored.select(spine.column_names).equals(spine)
    model = models[name]
    watched = dict(zip(loaded.users["user_id"].to_pylist(), loaded.users["history_note_ids"].to_pylist(), strict=True))
    for place, row in enumerate(rows):
        history = watched[loaded.words["user_id"][row].as_py()] + loaded.clicks_R[row].as_py()
        note_id, surface = loaded.words["note_id"][row].as_py(), loaded.words["surface"][row].as_py()
        if name == "two_tower":
            user, attributes = loaded.columns(model.user_features)[row], loaded.user_attributes()[row]
            vector = model.note_vectors[model.note_ids.index(note_id)]
            expected = float(model.user_vector(history, user, attributes) @ vector)
            assert scored["two_tower_score"][place].as_py() == pytest.approx(expected, abs=2e-6)
            continue
        user, notes = loaded.columns(model.user_features)[row], loaded.columns(model.note_features)[[row]]
        if name == "l1":
            assert scored["l1_score"][place].as_py() == pytest.approx(model.score(user, notes, surface=surface)[0], abs=2e-6)
        else:
            attributes = loaded.user_attributes()[row]
            served = model.score(user, history, [note_id], notes, surface=surface, user_attributes=attributes)
            assert scored["l2_click"][place].as_py() == pytest.approx(served["click"][0], abs=2e-6)


@pytest.fixture
def export_folder(export):
    return export


def test_a_spine_without_what_the_model_reads_is_refused_by_name(home, export_folder, tmp_path):
    spine = pq.read_table(export_folder / "examples.parquet").slice(0, 5)
    words = [
        "score",
        "l2",
        "--spine",
        str(tmp_path / "s.parquet"),
        "--out",
        str(tmp_path / "o"),
        "--export",
        str(export_folder),
    ]
    for column, message in (
        ("note_age_min", "lacks the feature.s. note_age_min; `headrace features compute` adds them"),
        ("user_last_clicks_30d", "lacks user_last_clicks_30d, which l2 reads"),
        ("user_id", "lacks the column.s. user_id"),
    ):
        pq.write_table(spine.drop_columns([column]), tmp_path / "s.parquet")
        with pytest.raises(HeadraceError, match=message):
            artefacts_cli.main(words)


def test_vectors_are_dated_rows_of_the_lake_written_once(models, loaded, home, export_folder, capsys):
    for expected in ("120 vectors of two_tower@0001-", "are there already"):
        assert artefacts_cli.main(["embed", "two_tower", "--export", str(export_folder)]) == 0
        assert expected in capsys.readouterr().out
    lake = Lake.open(Home(home))
    notes, users = lake.scan("lake.note_vectors"), lake.scan("lake.user_vectors")
    assert notes["note_id"].to_pylist() == models["two_tower"].note_ids
    assert np.allclose(np.stack(notes["vector"].to_numpy()), models["two_tower"].note_vectors)
    assert set(notes["event_ts"].cast(pa.int64()).to_pylist()) == {int(loaded.request_us_R.max())}
    user_id = loaded.words["user_id"][len(loaded) - 1].as_py()
    watched = dict(zip(loaded.users["user_id"].to_pylist(), loaded.users["history_note_ids"].to_pylist(), strict=True))
    user, attributes = loaded.columns(models["two_tower"].user_features)[-1], loaded.user_attributes()[-1]
    history = watched[user_id] + loaded.clicks_R[len(loaded) - 1].as_py()
    expected = models["two_tower"].user_vector(history, user, attributes)
    vector = dict(zip(users["user_id"].to_pylist(), users["vector"].to_pylist(), strict=True))[user_id]
    assert np.allclose(vector, expected, atol=1e-6)


def test_promoting_keeps_the_version_before_and_rollback_returns_to_it(home, models, capsys):
    registry = Registry(home / "models")
    first = registry.resolve("l1")
    second = registry.publish("l1", models["l1"].to_files(), {"note": "another"})
    registry.set_alias("l1", "candidate", second)
    assert artefacts_cli.main(["models", "promote", "l1@candidate"]) == 0
    assert registry.aliases("l1") == {"candidate": second, "previous": first, "production": second}
    assert artefacts_cli.main(["models", "rollback", "l1"]) == 0
    assert registry.aliases("l1") == {"candidate": second, "previous": second, "production": first}
    capsys.readouterr()
    assert artefacts_cli.main(["models"]) == 0
    assert "candidate, previous" in capsys.readouterr().out


def test_a_version_is_found_by_number_alias_or_name(home):
    registry = Registry(home / "models")
    version = registry.resolve("l1")
    for reference in ("l1", "l1@1", "l1@0001", "l1@production", f"l1@{version}"):
        assert registry.find(reference) == ("l1", version)
    with pytest.raises(HeadraceError, match=rf"model l1 has 0 versions numbered 7; it has {version}"):
        registry.find("l1@7")
    with pytest.raises(HeadraceError, match="has no 'candidate' version"):
        registry.find("l1@candidate")
