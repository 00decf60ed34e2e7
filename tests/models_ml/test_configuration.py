import pytest

from models_ml import configuration
from warehouse.errors import HeadraceError


def _read(tmp_path, text):
    path = tmp_path / "config.yml"
    path.write_text(text)
    return configuration.read(path)


def test_sections_change_what_they_name_and_nothing_else(tmp_path):
    configs = _read(
        tmp_path,
        "seed: 3\nl1: {head_weights: {click: 2, like: 1}}\nl2: {heads: [click], learning_rate: 1}\ntrainer: {keep: 9}\n",
    )
    assert configs.seed == 3
    assert configs.l1.head_weights == (("click", 2), ("like", 1))
    assert (configs.l2.heads, configs.l2.learning_rate) == (("click",), 1.0)
    assert configs.trainer.keep == 9
    assert configs.l2.width == configuration.Configs().l2.width
    assert _read(tmp_path, "") == configuration.Configs()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "l3: {}",
            r"config.yml:1: unknown section 'l3'; there are distillation, floor, item_to_item, l1, l2, seed, .*two_tower",
        ),
        ("seed: 1\nl2:\n  widht: 3", r"config.yml:3: l2 has no setting 'widht'; it has .*width"),
        ("l2:\n  width: wide", r"config.yml:2: l2.width must be like 24, got 'wide'"),
        ("trainer:\n  precision: fp8", r"config.yml:1: trainer: precision must be fp32 or bf16, got 'fp8'"),
        ("l2: 3", r"config.yml:1: l2 must hold settings such as `epochs: 3`, got 3"),
        ("seed: x", r"config.yml:1: seed must be a whole number, got 'x'"),
        ("- l2", r"config.yml:1: a configuration is sections such as"),
        ("l2: {width: 3\nseed: 1", r"config.yml:2: not YAML: "),
    ],
)
def test_a_mistake_is_said_with_its_line(tmp_path, text, message):
    with pytest.raises(HeadraceError, match=message):
        _read(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(HeadraceError, match=r"nowhere.yml cannot be read: No such file"):
        configuration.read(tmp_path / "nowhere.yml")
