import hashlib
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models_ml import l2, request_rows
from models_ml.l2_network import L2Config, L2Network, Shape
from models_ml.notes import NoteWords
from models_ml.request_rows import RequestRows, RequestTable
from warehouse.errors import HeadraceError

HEADS = ("click", "long_view")


@pytest.fixture
def written(loaded, tmp_path):
    table = request_rows.requests_of(loaded, loaded.train_rows)
    request_rows.write(table, tmp_path / "rows", {}, group_rows=500)
    return RequestRows(tmp_path / "rows")


@pytest.fixture
def rows_folder(tmp_path):
    return tmp_path / "rows"


@pytest.fixture(scope="module")
def of_four(loaded):
    """The same export, every four impressions in one request."""
    first = np.arange(len(loaded)) // 4 * 4
    user_columns = [loaded.feature_names.index(name) for name in loaded.user_features]
    values = loaded.values_RF.copy()
    values[:, user_columns] = values[first][:, user_columns]
    words = loaded.words.set_column(1, "user_id", loaded.words["user_id"].take(first))
    words = words.set_column(4, "surface", words["surface"].take(first))
    return replace(
        loaded, values_RF=values, words=words, request_us_R=loaded.request_us_R[first], clicks_R=loaded.clicks_R.take(first)
    )


def test_impressions_of_one_request_share_its_row(of_four):
    table = request_rows.requests_of(of_four, of_four.train_rows)
    counts = np.diff(request_rows.offsets_of(table))
    assert counts.sum() == len(of_four.train_rows)
    assert (counts[:-1] == 4).all()
    assert table["user_num_views_7d"].type == pa.float64()
    assert table["note_num_views_7d"].type == pa.list_(pa.float64())
    impressions = [one for request in table["impression_id"].to_pylist() for one in request]
    expected = of_four.words["impression_id"].take(of_four.train_rows).to_pylist()
    assert sorted(impressions) == sorted(expected)


def test_other_features_of_the_reader_are_another_request(of_four):
    values = of_four.values_RF.copy()
    values[1, of_four.feature_names.index("user_num_views_7d")] += 1
    table = request_rows.requests_of(replace(of_four, values_RF=values), of_four.train_rows)
    assert len(table) > len(request_rows.requests_of(of_four, of_four.train_rows))


def test_a_model_reads_from_files_what_it_reads_of_the_export(loaded, written):
    config = L2Config(heads=HEADS, history_length=10)
    shape = Shape(NoteWords.of(loaded), loaded.user_features, loaded.note_features, ("tab_0", "tab_1"), ("keen=true",))
    source = written.encoded(l2.encoder_of(shape, config))
    groups = [source.read(group) for group in range(len(source.group_sizes))]
    inputs = l2.inputs_of(loaded, shape, config.history_length)
    rows = loaded.train_rows
    order = np.lexsort((loaded.words["user_id"].to_numpy()[rows], loaded.request_us_R[rows]))
    rows = rows[order]
    assert np.array_equal(np.concatenate([part.per_row["history"] for part in groups]), inputs.history_RL.numpy()[rows])
    assert np.array_equal(np.concatenate([part.per_row["surface"] for part in groups]), inputs.surface_R.numpy()[rows])
    users = np.concatenate([part.per_row["user"] for part in groups])
    assert np.array_equal(users, inputs.user_RU.numpy()[rows], equal_nan=True)
    features = np.concatenate([part.per_candidate["features"] for part in groups])
    assert np.array_equal(features, inputs.note_RI.numpy()[rows], equal_nan=True)
    assert np.array_equal(np.concatenate([part.per_candidate["note"] for part in groups]), inputs.note_R.numpy()[rows])
    bits = np.concatenate([np.unpackbits(part.per_row["attributes"], axis=1, count=1) for part in groups])
    assert np.array_equal(bits, inputs.attributes_SA.numpy()[inputs.attributes_of_R.numpy()[rows]])
    labels = np.concatenate([part.per_candidate["labels"] for part in groups])
    assert np.array_equal(labels, np.column_stack([loaded.labels[head] for head in config.heads])[rows])


@torch.no_grad()
def test_rows_with_several_candidates_train_as_their_impressions_would(of_four):
    config = L2Config(
        HEADS, history_length=5, width=8, hidden=16, members=1, bins=0, dropout=0, id_dropout=0, attribute_dropout=0
    )
    shape = Shape(NoteWords.of(of_four), of_four.user_features, of_four.note_features, ("tab_0", "tab_1"), ("keen=true",))
    network = L2Network(config, shape)
    objective = l2.L2Objective(network)
    source = RequestTable.of_examples(of_four).encoded(l2.encoder_of(shape, config))
    some = source.read(0).take(np.arange(40))
    together = objective(l2.tensors_of(some, 1))
    impressions = request_rows.requests_of(of_four, of_four.train_rows[:160])
    alone = 0.0
    encode = l2.encoder_of(shape, config)
    for place in range(4):
        lists = {
            name: pc_element(impressions[name], place)
            if pa.types.is_list(impressions[name].type) and name != "history_note_ids"
            else impressions[name]
            for name in impressions.column_names
        }
        alone = alone + objective(l2.tensors_of(encode(pa.table(lists), np.arange(40)), 1))
    assert float(together) == pytest.approx(float(alone), rel=1e-5)


def pc_element(lists: pa.ChunkedArray, place: int) -> pa.ListArray:
    """Lists with one element, the one at `place`."""
    whole = lists.combine_chunks()
    return pa.ListArray.from_arrays(
        pa.array(range(len(whole) + 1), pa.int32()), whole.flatten().take(pa.array(range(place, 4 * len(whole), 4)))
    )


def test_the_same_export_is_written_once(loaded, tmp_path):
    request_rows.of_examples(loaded, tmp_path / "rows")
    before = (tmp_path / "rows" / "manifest.json").stat().st_mtime_ns
    first = request_rows.of_examples(loaded, tmp_path / "rows")
    assert (tmp_path / "rows" / "manifest.json").stat().st_mtime_ns == before
    other = replace(loaded, manifest={**loaded.manifest, "dataset": "another"})
    assert request_rows.of_examples(other, tmp_path / "rows").fingerprint != first.fingerprint


def test_a_changed_file_set_is_refused_and_the_file_named(written, rows_folder):
    part = rows_folder / "part-00000.parquet"
    content = part.read_bytes()
    part.write_bytes(content[:-1])
    with pytest.raises(HeadraceError, match=r"part-00000.parquet has [\d,]+ bytes, the manifest says"):
        RequestRows(rows_folder)
    part.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    with pytest.raises(HeadraceError, match=r"part-00000.parquet has changed: its SHA-256 is"):
        RequestRows(rows_folder).table(0)
    part.write_bytes(content)
    pq.write_table(pa.table({"x": [1]}), rows_folder / "part-00001.parquet")
    with pytest.raises(HeadraceError, match=r"part-00001.parquet is not in the manifest"):
        RequestRows(rows_folder)
    (rows_folder / "part-00001.parquet").unlink()
    part.unlink()
    with pytest.raises(HeadraceError, match=r"part-00000.parquet is missing but in the manifest"):
        RequestRows(rows_folder)


def test_a_group_that_cannot_be_read_is_named(written, rows_folder):
    part = rows_folder / "part-00000.parquet"
    manifest = json.loads((rows_folder / "manifest.json").read_text())
    content = bytearray(part.read_bytes())
    content[200:5000] = b"\xff" * 4800
    part.write_bytes(content)
    manifest["files"][part.name]["sha256"] = hashlib.sha256(content).hexdigest()
    (rows_folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(HeadraceError, match=r"part-00000.parquet, row group 0, cannot be read"):
        RequestRows(rows_folder).table(0)
