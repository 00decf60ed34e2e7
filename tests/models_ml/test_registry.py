import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from models_ml.registry import Registry
from warehouse.errors import HeadraceError

FILES = {"weights.safetensors": b"w" * 10, "model.json": b"{}"}


@pytest.fixture
def registry(tmp_path) -> Registry:
    return Registry(tmp_path)


def test_a_published_version_is_found_under_its_alias(registry):
    version = registry.publish("l1", FILES, {"seed": 3})
    registry.set_alias("l1", "production", version)
    path = registry.path("l1")
    assert path.name == version
    assert (path / "weights.safetensors").read_bytes() == FILES["weights.safetensors"]
    assert registry.manifest("l1")["seed"] == 3
    assert registry.manifest("l1")["files"]["model.json"]["bytes"] == 2


def test_the_same_content_is_the_same_version(registry):
    first = registry.publish("l1", FILES, {"seed": 3})
    assert registry.publish("l1", FILES, {"seed": 3}) == first
    assert registry.publish("l1", FILES, {"seed": 4}) != first
    assert [version[:4] for version in registry.versions("l1")] == ["0001", "0002"]


@pytest.mark.parametrize("file_name", ["weights.safetensors", "model.json", "manifest.json"])
def test_a_changed_file_is_refused(registry, file_name):
    version = registry.publish("l1", FILES, {})
    path = registry.root / "l1" / version / file_name
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(HeadraceError, match=f"{file_name} .*train again"):
        registry.path("l1", version)


def test_a_manifest_rewritten_to_fit_a_changed_file_is_refused(registry):
    import hashlib

    version = registry.publish("l1", FILES, {})
    folder = registry.root / "l1" / version
    (folder / "model.json").write_bytes(b"[]")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"]["model.json"]["sha256"] = hashlib.sha256(b"[]").hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(HeadraceError, match="is not what was published"):
        registry.path("l1", version)


def test_a_missing_and_an_added_file_are_refused(registry):
    version = registry.publish("l1", FILES, {})
    folder = registry.root / "l1" / version
    (folder / "extra.json").write_text("{}")
    with pytest.raises(HeadraceError, match=r"extra\.json was not published with it"):
        registry.path("l1", version)
    (folder / "extra.json").unlink()
    (folder / "model.json").unlink()
    with pytest.raises(HeadraceError, match=r"model\.json is missing"):
        registry.path("l1", version)


def test_pickles_and_paths_are_not_published(registry):
    for file_name in ("model.pkl", "model.pt", "../model.json", "manifest.json"):
        with pytest.raises(HeadraceError, match="cannot be published"):
            registry.publish("l1", {file_name: b""}, {})
    assert registry.versions("l1") == []


def test_an_alias_must_point_at_a_whole_version(registry):
    with pytest.raises(HeadraceError, match=r"has no version '0009-0123456789ab'.*it has none"):
        registry.set_alias("l1", "production", "0009-0123456789ab")
    with pytest.raises(HeadraceError, match="run: headrace train l1"):
        registry.path("l1")


def test_names_stay_inside_the_registry(registry):
    with pytest.raises(HeadraceError, match="lower-case letters"):
        registry.publish("../l1", FILES, {})
    with pytest.raises(HeadraceError, match="lower-case letters"):
        registry.path("l1", "../../etc")


def test_readers_see_the_old_or_the_new_alias_and_nothing_between(registry):
    versions = [registry.publish("l1", FILES, {"seed": seed}) for seed in range(2)]
    registry.set_alias("l1", "production", versions[0])

    def flip() -> None:
        for turn in range(100):
            registry.set_alias("l1", "production", versions[turn % 2])

    with ThreadPoolExecutor(1) as other:
        flipping = other.submit(flip)
        seen = set()
        while not flipping.done():
            seen.add(registry.resolve("l1"))
        flipping.result()
    assert seen <= set(versions)


def test_a_failed_publication_leaves_nothing(registry, monkeypatch):
    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(HeadraceError, match="No space left on device"):
        registry.publish("l1", FILES, {})
    assert list((registry.root / "l1").iterdir()) == []
