"""Declarations: what is wrong is refused with file, line, rule and remedy; what means the same hashes the same."""

import pytest
import yaml

from warehouse.errors import HeadraceError
from warehouse.features.declarations import declarations_hash, load_groups
from warehouse.features.render import VARIABLES
from warehouse.home import REPOSITORY

STAGING = """
  - name: stg
    columns: [{name: event_type}, {name: user_id}, {name: note_id}, {name: watch_ms, data_type: bigint},
              {name: score, data_type: double}]
"""


def declare(
    tmp_path, measures="- {name: num, aggregation: count, windows: [1h]}", keys="[note_id]", derived="[]", events="stg"
):
    folder = tmp_path / "warehouse" / "models"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "x.yml").write_text(
        f"version: 2\nmodels:{STAGING}  - name: group\n    config:\n      meta:\n        features:\n          entity: note\n"
        f"          events: {events}\n          keys: {keys}\n          derived: {derived}\n"
        f"          measures:\n            {measures}\n"
    )
    return load_groups(tmp_path)


def test_a_feature_is_named_entity_measure_window(tmp_path):
    groups = declare(
        tmp_path,
        "- {name: num_views, aggregation: count, windows: [1h, 30d]}",
        derived="[{name: half, expression: num_views_1h / 2}]",
    )
    assert groups["group"].feature_names == ("note_num_views_1h", "note_num_views_30d", "note_half")


def test_a_division_of_doubles_by_what_is_never_0_is_taken(tmp_path):
    of = "-(cast(watch_ms as double precision) * 2 + 1) / 3 / nullif(watch_ms, 0)"
    group = declare(tmp_path, f"- {{name: a, aggregation: sum, of: {of!r}, type: double, windows: [1h]}}")["group"]
    assert group.measures[0].of == of


@pytest.mark.parametrize(
    "words",
    [
        "aggregation: count, bucket_by: cast(score as bigint)",
        "aggregation: count, bucket_by: score > 1",
        "aggregation: count, of: score",
        "aggregation: top_k, k: 2, of: 'coalesce(watch_ms, 0)'",
        "aggregation: last, of: cast(score * 100 as bigint)",
        "aggregation: last, of: score, type: double",
        "aggregation: avg, of: score / 3, type: double",
    ],
)
def test_what_engines_read_alike_is_taken(tmp_path, words):
    assert len(declare(tmp_path, f"- {{name: a, {words}, windows: [1h]}}")["group"].measures) == 1


def test_every_setting_is_read(tmp_path):
    group = declare(
        tmp_path,
        "- {name: p90, aggregation: approx_quantile, of: watch_ms, q: 0.9, empty: -1, "
        "windows: [lifetime, {kind: session, gap: 30m}]}\n            "
        "- {name: num, aggregation: count, bucket_by: event_type, windows: [1h]}",
        keys="[{name: hour_of_day, part: hour, zone: Asia/Shanghai}, note_id]",
    )["group"]
    assert group.keys == ("note_id", "hour_of_day")
    assert group.entity_keys == ("note_id",)
    assert group.block_key(("n",), 1_767_225_600_000_000) == ("n", "8")
    assert group.feature_names == ("note_p90_lifetime", "note_p90_session_30m")
    assert group.map_names == ("note_num_1h",)
    p90 = group.measures[0]
    assert (p90.q, p90.relative_error, p90.empty, p90.type, p90.representation) == (0.9, 0.01, -1.0, "double", "map")
    assert [window.session_gap_us for window in p90.windows] == [None, 30 * 60_000_000]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": "[nope]"}, r"x.yml:\d+: key nope is no column of stg; it has event_type, note_id"),
        ({"events": "raw"}, "reads raw, which is no model"),
        (
            {"measures": "- {name: a, aggregation: median, of: watch_ms, windows: [1h]}"},
            r"x.yml:\d+: measure a: aggregation must be one of count",
        ),
        ({"measures": "- {name: a, aggregation: sum, windows: [1h]}"}, "sum needs `of`"),
        ({"measures": "- {name: a, aggregation: count, windows: [7m]}"}, "multiple of 5m"),
        ({"measures": "- {name: a, aggregation: count}"}, "has no windows; write for example"),
        ({"measures": "- {name: a, aggregation: count, windows: [1h], widow: 2}"}, "unknown settings"),
        ({"measures": "- {name: a, aggregation: count, where: event_typ = 'x', windows: [1h]}"}, "where: no column event_typ"),
        (
            {"measures": "- {name: a, aggregation: count, where: event_type = current_date, windows: [1h]}"},
            "is not allowed; use",
        ),
        ({"measures": "- {name: a, aggregation: count, where: random() > 0.5, windows: [1h]}"}, "is not allowed; use"),
        ({"measures": "- {name: a, aggregation: count, where: event_type =, windows: [1h]}"}, "cannot be parsed"),
        (
            {"measures": "- {name: a, aggregation: last_n, of: note_id, type: bigint, n: 2, windows: [1h]}"},
            "last_n takes type varchar, got 'bigint'",
        ),
        ({"measures": "- {name: a, aggregation: last_n, of: note_id, windows: [1h]}"}, "needs a positive n"),
        ({"measures": "- {name: a, aggregation: count, n: 3, windows: [1h]}"}, "n is a setting of first_n, last_n"),
        ({"measures": "- {name: a, aggregation: approx_quantile, of: watch_ms, q: 90, windows: [1h]}"}, "needs q, from 0 to 1"),
        (
            {"measures": "- {name: a, aggregation: approx_quantile, of: watch_ms, q: 1, relative_error: 0.5, windows: [1h]}"},
            "is from 0.001 to 0.1; got 0.5",
        ),
        ({"measures": "- {name: a, aggregation: var, of: watch_ms, bucket_by: note_id, windows: [1h]}"}, "bucket_by goes with"),
        ({"measures": "- {name: a, aggregation: count, bucket_by: nope, windows: [1h]}"}, "bucket_by: no column nope"),
        ({"measures": "- {name: a, aggregation: sum, of: watch_ms, empty: 1, windows: [1h]}"}, "sum is never NULL"),
        ({"measures": "- {name: a, aggregation: max, of: watch_ms, empty: none, windows: [1h]}"}, "cannot take 'none'"),
        (
            {"measures": "- {name: a, aggregation: count, windows: [{kind: session, gap: 7m}]}"},
            "measure a: gap must be a multiple of 5m",
        ),
        (
            {"measures": "- {name: a, aggregation: count, windows: [{kind: hop, gap: 5m}]}"},
            "lifetime, or {kind: session, gap: 30m}",
        ),
        (
            {"measures": "- {name: a, aggregation: sum, of: watch_ms / 3, type: double, windows: [1h]}"},
            r"watch_ms / 3 divides integers.*cast\(… as double precision\) / …",
        ),
        (
            {"measures": "- {name: a, aggregation: count, where: 1 < cast(1 as double) / watch_ms, windows: [1h]}"},
            r"may divide by 0.*nullif\(…, 0\)",
        ),
        *(
            (
                {"measures": f"- {{name: a, {words}, windows: [1h]}}"},
                rf"x.yml:\d+: measure a: {setting}: .* is {found} and read as text.*cast\(… as bigint\)",
            )
            for words, setting, found in (
                ("aggregation: count, bucket_by: score", "bucket_by", "double"),
                ("aggregation: count, bucket_by: watch_ms * 0.5", "bucket_by", "decimal"),
                ("aggregation: top_k, k: 2, of: score + 1", "of", "double"),
                ("aggregation: last_n, n: 2, of: 'coalesce(score, 0)'", "of", "double"),
                ("aggregation: approx_count_distinct, of: case when score > 1 then 1 else sqrt(watch_ms) end", "of", "double"),
                ("aggregation: count, where: cast(score as varchar) = '1'", "where", "double"),
            )
        ),
        *(
            (
                {"measures": f"- {{name: a, aggregation: {aggregation}, of: {of!r}, windows: [1h]}}"},
                rf"x.yml:\d+: measure a: of: .* is {found}, declared bigint.*declare type: double, or write cast",
            )
            for aggregation, of, found in (
                ("first", "score", "double"),
                ("last", "-score", "double"),
                ("sum", "watch_ms * 0.5", "decimal"),
                ("max", "greatest(watch_ms, ln(watch_ms))", "double"),
            )
        ),
        ({"keys": "[{name: hour, part: hour, zone: UTC}]"}, "has calendar keys only"),
        ({"keys": "[note_id, {name: hour, part: hour, zone: Mars}]"}, "no time zone 'Mars'"),
        ({"keys": "[note_id, {name: hour, part: minute, zone: UTC}]"}, "part must be one of hour, day_of_week"),
        ({"keys": "[{name: user_id, part: hour, zone: UTC}, note_id]"}, "has the name of a column of the events"),
        ({"measures": "- {name: a, aggregation: count, freshness: event, anchor: tick, windows: [1h]}"}, "freshness is block"),
        (
            {"measures": "\n            ".join(["- {name: num, aggregation: count, windows: [1h]}"] * 2)},
            "num is declared twice",
        ),
        ({"derived": "[{name: r, expression: num_7d / 2}]"}, "derived r: no column num_7d; there are num_1h"),
    ],
)
def test_a_wrong_declaration_says_where_what_and_what_would_be_right(tmp_path, changes, message):
    with pytest.raises(HeadraceError, match=message):
        declare(tmp_path, **changes)


def test_prose_does_not_change_the_meaning_but_a_filter_does(tmp_path):
    plain = declarations_hash(declare(tmp_path))
    described = declarations_hash(declare(tmp_path, "- {name: num, aggregation: count, windows: [1h], description: words}"))
    filtered = declarations_hash(declare(tmp_path, "- {name: num, aggregation: count, windows: [1h], where: watch_ms > 1}"))
    assert plain == described
    assert plain != filtered


def test_the_variables_of_dbt_and_of_python_are_the_same():
    declared = yaml.safe_load((REPOSITORY / "dbt_project.yml").read_text())["vars"]
    assert {name: declared[name] for name in VARIABLES} == VARIABLES
