"""The unit tests declared beside the feature groups hold, a wrong one fails with its place, and a bad one is refused."""

import shutil

import pytest

from warehouse.cli import main
from warehouse.errors import HeadraceError
from warehouse.features.declarations import declarations_hash, load_groups
from warehouse.features.unit import failures, load_unit_tests, run_unit_tests
from warehouse.home import REPOSITORY

GROUPS = load_groups()
FILE = "warehouse/models/blocks/_blocks.yml"


@pytest.mark.parametrize("test", load_unit_tests(GROUPS), ids=lambda test: test.name)
def test_declared(test):
    assert failures(test, GROUPS[test.group]) == []


@pytest.fixture
def project(tmp_path):
    shutil.copytree(REPOSITORY / "warehouse" / "models", tmp_path / "warehouse" / "models")
    return tmp_path


def changed(project, old, new):
    path = project / FILE
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def test_a_wrong_expectation_fails_in_every_execution_with_its_place(project):
    changed(project, "note_num_clicks_1h: 1, note_ctr_1h: 0.5}", "note_num_clicks_1h: 2, note_ctr_1h: 0.5}")
    (told,) = [sentences for _, sentences in run_unit_tests(load_groups(project), project) if sentences]
    line = next(at for at, text in enumerate((project / FILE).read_text().splitlines(), 1) if "a_click_counts_from" in text)
    assert told == [
        f"{FILE}:{line}: test a_click_counts_from_the_tick_that_ends_its_block: "
        "note_num_clicks_1h is 1 by batch SQL and compute, expected 2"
    ]


def test_a_changed_feature_fails_its_test_and_a_changed_test_changes_no_feature(project):
    changed(project, "where: \"event_type = 'click'\", windows: [1h, 6h", "where: \"event_type = 'view'\", windows: [1h, 6h")
    assert any("note_num_clicks_1h is 2" in one for _, told in run_unit_tests(load_groups(project), project) for one in told)
    changed(
        project, "where: \"event_type = 'view'\", windows: [1h, 6h, 1d, 7d]}\n", "where: null, windows: [1h, 6h, 1d, 7d]}\n"
    )
    before = declarations_hash(load_groups(project))
    changed(project, "expect: {note_num_views_1h: 2", "expect: {note_num_views_1h: 3")
    assert declarations_hash(load_groups(project)) == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("expect: {note_num_views_1h: 2", "expect: {note_num_vews_1h: 2", r"yml:\d+: test a_click.* names note_num_vews_1h"),
        ('"2026-01-01T10:06:00Z"', '"2026-01-01T10:06:00"', r"request_ts '2026.*' is no time with a zone"),
        ('note_id: n1, request_ts: "2026-01-01T10:06:00Z"', "note_id: n1", r"request needs request_ts"),
        ("{note_num_views_1h: 2,", "{note_num_views_1h: 2}\n              given: {x: 1,", r"unknown settings \['given'\]"),
        ('note_id: n1, event_ts: "2026-01-01T10:01:00Z"}', "note_id: n1}", r"an event needs event_type and event_ts"),
    ],
)  # fmt: skip
def test_a_bad_test_is_refused_with_its_place(project, old, new, message):
    changed(project, old, new)
    with pytest.raises(HeadraceError, match=message):
        load_unit_tests(load_groups(project), project)


def test_a_request_without_the_key_is_refused(project):
    changed(project, "request: {note_id: n1, request_ts", "request: {user_id: n1, request_ts")
    with pytest.raises(HeadraceError, match=r"_blocks.yml:\d+: test a_click.*: request has no column note_id"):
        list(run_unit_tests(load_groups(project), project))


def test_the_command_says_how_many_pass(capsys):
    assert main(["features", "check", "--unit"]) == 0
    number = len(load_unit_tests(GROUPS))
    assert f"{number} of {number} unit tests pass" in capsys.readouterr().out
