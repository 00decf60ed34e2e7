import json
from dataclasses import replace

import numpy as np
import pytest

from models_ml import configuration, distillation, l1, l2, train
from models_ml.distillation import DistillationConfig
from models_ml.l2_network import L2Config
from models_ml.registry import Registry
from models_ml.request_rows import RequestTable
from warehouse.errors import HeadraceError


def quiet(name, done, total):
    pass


def values(rows, name):
    tables = [rows.table(group, [name]) for group in range(len(rows.group_sizes))]
    return [value for table in tables for one in table[name].to_pylist() for value in one]


def test_labels_are_mixed_by_hand_and_unseen_ones_stay_unseen(loaded):
    labels = {name: label_R.copy() for name, label_R in loaded.labels.items()}
    labels["click"][loaded.train_rows[0]] = np.nan
    some = replace(loaded, labels=labels)
    said = {"click": np.linspace(0, 1, len(some.train_rows), dtype=np.float32)}
    mixed = distillation.taught_rows(some, said, DistillationConfig(share=0.25))
    plain = RequestTable.of_examples(some)
    found = dict(zip(values(mixed, "impression_id"), values(mixed, "label_click"), strict=True))
    ids = some.words["impression_id"].to_pylist()
    for place, row in list(enumerate(some.train_rows))[:50]:
        value = found[ids[row]]
        assert (
            value is None if place == 0 else value == pytest.approx(0.75 * labels["click"][row] + 0.25 * said["click"][place])
        )
    assert values(mixed, "label_long_view") == values(plain, "label_long_view")
    other = distillation.taught_rows(some, said, DistillationConfig(share=0.5))
    assert len({mixed.fingerprint, plain.fingerprint, other.fingerprint}) == 3


def test_a_student_of_l2_alone_is_nearer_to_it_than_one_of_labels(loaded, tmp_path):
    configs = configuration.Configs(l1=l1.L1Config(epochs=6), l2=L2Config(epochs=2, width=8, hidden=16))
    registry = Registry(tmp_path)
    train.train(loaded, ["l2", "l1"], configs, 0, registry, quiet)
    teacher = l2.load(registry.path("l2")).score_rows(loaded, loaded.test_rows)["click"]
    of_labels = l1.load(registry.path("l1")).score_rows(loaded, loaded.test_rows)["click"]
    taught = replace(configs, distillation=DistillationConfig(share=1.0))
    train.train(loaded, ["l1"], taught, 0, registry, quiet)
    of_teacher = l1.load(registry.path("l1")).score_rows(loaded, loaded.test_rows)["click"]
    assert np.abs(of_teacher - teacher).mean() < np.abs(of_labels - teacher).mean()
    manifest = json.loads((registry.path("l1") / "manifest.json").read_text())
    assert manifest["teacher"] == f"l2@{registry.resolve('l2')}"


def test_a_share_beyond_one_is_refused_with_its_line(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text("seed: 1\ndistillation: {share: 1.5}\n")
    with pytest.raises(HeadraceError, match=r"config.yml:2: distillation: share must be between 0 and 1, got 1.5"):
        configuration.read(path)
