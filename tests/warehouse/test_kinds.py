"""Features that are no aggregation of events: declared in dbt properties, refused with file and line, typed."""

import json
import math
import shutil

import pytest

from warehouse.errors import HeadraceError
from warehouse.features.compute_plan import plan
from warehouse.features.declarations import load_groups
from warehouse.features.kinds.declared import load_kinds
from warehouse.features.kinds.shown import kind_rows
from warehouse.home import REPOSITORY

FILE = "warehouse/models/staging/_kinds.yml"
DECLARED = """version: 2
sources:
  - name: outside
    schema: lake
    tables:
      - name: forward_log
        config:
          meta:
            features:
              - kind: request
                features:
                  - {name: device, type: varchar, allowed: [phone, desktop], empty: phone, description: What it runs on.}
                  - {name: text_match, type: double}
                  - {name: is_weekend, type: boolean, empty: false}
              - kind: http
                entity: user
                features:
                  - {name: credit, type: double, url: "http://127.0.0.1:9/credit/{user_id}?d={device}", path: "a[0].score",
                     timeout_ms: 50, default: 0.5}
      - name: note_quality
        config:
          meta:
            features:
              kind: table
              entity: note
              keys: [note_id]
              event_time: scored_at
              available_at: loaded_at
              tie: [version]
              columns:
                - {name: quality, type: double, empty: 0.5}
        columns: [{name: note_id}, {name: scored_at}, {name: loaded_at}, {name: version}, {name: quality}]
"""


@pytest.fixture
def project(tmp_path):
    shutil.copytree(REPOSITORY / "warehouse" / "models", tmp_path / "warehouse" / "models")
    (tmp_path / FILE).write_text(DECLARED)
    return tmp_path


def test_three_kinds_are_read_and_groups_are_not_disturbed(project):
    kinds = load_kinds(project)
    assert list(load_groups(project)) == list(load_groups())
    assert kinds.served_inputs == (
        "request_device_is_phone",
        "request_device_is_desktop",
        "request_text_match",
        "request_is_weekend",
        "user_credit",
        "user_credit_is_default",
    )
    (table,) = kinds.tables
    assert table.feature_names == ("note_quality",)
    assert (table.relation, table.order) == ("lake.note_quality", ("version", "quality"))
    assert (table.event_time, table.available_at) == ("scored_at", "loaded_at")
    rows = {row["feature"]: row for row in kind_rows(kinds)}
    assert list(rows) == ["request_device", "request_text_match", "request_is_weekend", "user_credit", "note_quality"]
    assert "never recomputed" in rows["request_device"]["known"]
    assert rows["note_quality"]["lineage"].startswith("lake.note_quality.quality -> last row: scored_at < t")
    json.dumps(list(rows.values()))


def test_words_become_one_number_each_and_nothing_becomes_the_empty_value(project):
    device, text_match, is_weekend = (feature.value for feature in load_kinds(project).request)
    assert device.numbers(device.checked("desktop")) == [0.0, 1.0]
    assert device.checked(None) == "phone"
    assert is_weekend.numbers(is_weekend.checked(True)) == [1.0]
    assert text_match.checked(3) == 3.0
    assert math.isnan(text_match.numbers(text_match.checked(None))[0])


@pytest.mark.parametrize(
    ("feature", "value", "message"),
    [
        ("device", "fridge", "request_device must be one of phone, desktop; got 'fridge'"),
        ("device", 3, "request_device must be one of phone, desktop; got 3"),
        ("text_match", "high", "request_text_match must be a number such as 0.5; got 'high'"),
        ("text_match", float("nan"), "request_text_match must be a number such as 0.5; got nan"),
        ("text_match", True, "request_text_match must be a number such as 0.5; got True"),
        ("is_weekend", 1, "request_is_weekend must be true or false; got 1"),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_is_right(project, feature, value, message):
    (declared,) = [one.value for one in load_kinds(project).request if one.context_key == feature]
    with pytest.raises(HeadraceError) as error:
        declared.checked(value)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: table", "kind: tabel", r"_kinds.yml:\d+: kind must be one of request, http, table, got 'tabel'"),
        ("type: varchar, allowed: [phone, desktop]", "type: varchar", r"_kinds.yml:12: request_device: a varchar, and only"),
        ("empty: phone", "empty: fridge", r"_kinds.yml:12: request_device: empty: .*one of phone, desktop; got 'fridge'"),
        ("type: double}", "type: text}", r"_kinds.yml:13: request_text_match: type must be one of bigint, double"),
        ("empty: false", "emtpy: false", r"_kinds.yml:14: .*unknown settings \['emtpy'\]; allowed are"),
        ("http://127.0.0.1:9/credit", "http://{user_id}.example/credit", r"_kinds.yml:18: user_credit: the host of a url"),
        ("http://127.0.0.1:9/credit", "file:///etc/passwd", r"user_credit: url must start with http:// or https:// and a host"),
        ("?d={device}", "?d={note_id}", r"user_credit: url names note_id; it may name device, is_weekend"),
        ("timeout_ms: 50", "timeout_ms: 0", r"user_credit: timeout_ms must be a whole number from 1 to 5000, got 0"),
        ('path: "a[0].score"', 'path: "$..score"', r"user_credit: path must lead into the JSON"),
        ("event_time: scored_at", "event_time: socred_at", r"lake.note_quality has no column socred_at; the columns"),
        ("entity: note\n", "entity: note\n              key: [x]\n", r"kind table has unknown settings \['key'\]"),
        ("name: quality, type", "name: num_views_1h, type", r"no column num_views_1h"),
        ("name: text_match", "name: device", r"_kinds.yml:13: request_device is declared twice, first in .*_kinds.yml:12"),
    ],
)  # fmt: skip
def test_a_wrong_declaration_is_refused_with_file_line_and_remedy(project, old, new, message):
    assert old in DECLARED
    (project / FILE).write_text(DECLARED.replace(old, new, 1))
    with pytest.raises(HeadraceError, match=message):
        load_kinds(project)


def test_computing_a_feature_of_the_request_says_that_it_cannot_be(project):
    groups = load_groups()
    for name in ("request_device", "request_device_is_phone", "user_credit"):
        with pytest.raises(HeadraceError, match=f"{name} is .*known only from the forward log and cannot be recomputed"):
            plan(groups, ["user_id"], [name], load_kinds(project))
