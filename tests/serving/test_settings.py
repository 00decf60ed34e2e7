import pytest

from serving.settings import Settings
from warehouse.errors import HeadraceError


def test_a_file_replaces_only_what_it_names(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text("page_size: 7\nhead_weights: {click: 2}\n")
    settings = Settings.load(path)
    assert settings.page_size == 7
    assert settings.head_weights == {"click": 2}
    assert settings.max_notes_per_author == Settings.load().max_notes_per_author


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("page_sise: 7", "page_sise is not a serving setting"),
        ("page_size: many", "page_size must be a whole number of at least 0, got 'many'"),
        ("page_size: 2.5", "page_size must be a whole number"),
        ("logged_share: -1", "logged_share must be a number of at least 0"),
        ("generators: [trending]", "generators must map names to numbers"),
        ("generators: {trendy: 5}", "trendy is no generator; there are followed_authors"),
        ("diversity: 3", "diversity must be a word, got 3"),
        ("diversity: most", "diversity must be one of none, ssd, mmr, got 'most'"),
        ("exploration_share: 1.5", "exploration_share is a probability, got 1.5"),
        ("exploration_positions: [-1]", r"exploration_positions must be a list of positions of the page, counted from 0, got "),
        ("blocked_notes: n1", "blocked_notes must be a list of ids, got 'n1'"),
        ("vector_shards: 0", "vector_shards must be at least 1, got 0"),
        ("- a list", "must hold `name: value` lines"),
        ("page_size: [", "cannot read serving settings"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(tmp_path, text, said):
    path = tmp_path / "mine.yml"
    path.write_text(text)
    with pytest.raises(HeadraceError, match=said.replace("`", ".").replace("[", r"\[")):
        Settings.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(HeadraceError, match=r"cannot read serving settings .*none.yml"):
        Settings.load(tmp_path / "none.yml")
