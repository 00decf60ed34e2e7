"""Files that lie elsewhere: copied once, found again by content, shared by processes, bounded."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from models_ml import examples, request_rows
from models_ml.configuration import Configs
from models_ml.registry import Registry
from models_ml.request_rows import RequestRows
from models_ml.shards import Cache, Shard, Shards, told
from models_ml.train import Options, train
from models_ml.trainer.settings import TrainerSettings
from warehouse.errors import HeadraceError
from warehouse.home import REPOSITORY

MB = 1_000_000


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache", 10 * MB)


def put(folder: Path, number: int, num_bytes: int = 3 * MB) -> Shard:
    content = np.random.default_rng(number).bytes(num_bytes)
    shard = Shard(f"part-{number:05d}.parquet", hashlib.sha256(content).hexdigest(), num_bytes)
    (folder / shard.name).write_bytes(content)
    return shard


def copies(cache: Cache) -> set[str]:
    return {entry.stem for entry in cache.folder.glob("*.parquet")}


def drafts(cache: Cache) -> list[Path]:
    return list(cache.folder.glob(".draft-*"))


def test_a_file_is_fetched_once_and_a_damaged_copy_again(elsewhere, cache):
    shard, url = put(elsewhere, 0), elsewhere.as_uri()
    path = Shards(url, cache).local(shard)
    content = (elsewhere / shard.name).read_bytes()
    assert path.read_bytes() == content
    assert path.parent == cache.folder
    (elsewhere / shard.name).rename(elsewhere / "away")
    assert Shards(url, Cache(cache.folder, 10 * MB)).local(shard) == path, "read from the copy, not from there"
    path.write_bytes(content[:-1] + b"?")
    (elsewhere / "away").rename(elsewhere / shard.name)
    assert Shards(url, Cache(cache.folder, 10 * MB)).local(shard).read_bytes() == content
    assert drafts(cache) == []


def test_what_is_not_what_the_manifest_says_is_refused_and_leaves_nothing(elsewhere, cache):
    shard = put(elsewhere, 0)
    for damaged in (replace(shard, sha256="0" * 64), replace(shard, num_bytes=5), replace(shard, num_bytes=4 * MB)):
        if damaged.sha256 == shard.sha256 and damaged.num_bytes > shard.num_bytes:
            (elsewhere / shard.name).write_bytes((elsewhere / shard.name).read_bytes()[:-1])
        with pytest.raises(HeadraceError, match=r"part-00000\.parquet has changed: its SHA-256 is"):
            Shards(elsewhere.as_uri(), cache).local(damaged)
    (elsewhere / shard.name).unlink()
    with pytest.raises(HeadraceError, match=r"part-00000\.parquet cannot be read"):
        Shards(elsewhere.as_uri(), cache).local(shard)
    assert copies(cache) == set()
    assert drafts(cache) == []


def test_the_longest_unused_make_room_but_not_those_in_use(elsewhere, cache):
    first, second, third, fourth = (put(elsewhere, number) for number in range(4))
    reader, other = Shards(elsewhere.as_uri(), cache), Shards(elsewhere.as_uri(), Cache(cache.folder, 10 * MB))
    for shard in (first, second):
        Shards(elsewhere.as_uri(), Cache(cache.folder, 10 * MB)).local(shard)  # used, and no longer held
    os.utime(cache.folder / f"{first.sha256}.parquet", (1, 1))
    (cache.folder / ".draft-left-by-a-kill").write_bytes(bytes(MB))
    other.local(third)
    other.local(fourth)
    assert copies(cache) == {shard.sha256 for shard in (second, third, fourth)}
    assert drafts(cache) == []
    reader.local(second)
    with pytest.raises(HeadraceError, match=r"full of files in use; another 0\.003 GB are needed: raise trainer.cache_dir_gb"):
        reader.local(first)
    with pytest.raises(HeadraceError, match=r"holds 0.012 GB, the cache .* may hold 0.01: raise trainer.cache_dir_gb"):
        reader.require_room([first, second, third, fourth])


def test_two_processes_at_once_fetch_each_file_once(elsewhere, cache, tmp_path):
    shards = [put(elsewhere, number, MB) for number in range(4)]
    (tmp_path / "shards.json").write_text(json.dumps([[shard.name, shard.sha256, shard.num_bytes] for shard in shards]))
    script = f"""
import json, os, sys
from pathlib import Path
from models_ml import shards
fetch = shards.Cache._copy
def counted(cache, shard, *others):
    os.write(1, (shard.name + chr(10)).encode())
    fetch(cache, shard, *others)
shards.Cache._copy = counted
described = [shards.Shard(*one) for one in json.loads(Path({str(tmp_path / "shards.json")!r}).read_text())]
place = shards.Shards({elsewhere.as_uri()!r}, shards.Cache(Path({str(cache.folder)!r}), {10 * MB}))
sys.stdin.readline()
place.fetch_ahead(described[::-1])
for shard in described:
    assert place.local(shard).stat().st_size == shard.num_bytes
"""
    start = partial(
        subprocess.Popen,
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    started = [start(), start()]
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sorted("".join(said).split()) == [shard.name for shard in shards]
    assert drafts(cache) == []
    assert copies(cache) == {shard.sha256 for shard in shards}


def test_a_full_disk_is_said_and_leaves_nothing(elsewhere, cache):
    shard = put(elsewhere, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MB, hard))
    try:
        with pytest.raises(HeadraceError, match=r"the cache .* cannot be written: File too large; make room there"):
            Shards(elsewhere.as_uri(), cache).local(shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert copies(cache) == set()
    assert drafts(cache) == []


class _Bucket(BaseHTTPRequestHandler):
    """Of S3's protocol what a reader needs: a file's size, its bytes, the list of a folder."""

    protocol_version = "HTTP/1.1"
    folder: Path
    asked: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, _, query = self.path.partition("?")
        name = path.split("/")[-1]
        if "list-type=2" in query:
            entries = "".join(
                f"<Contents><Key>rows/{entry.name}</Key><Size>{entry.stat().st_size}</Size>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                for entry in sorted(self.folder.iterdir())
            )
            content = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()
            return self.answer(200, content, {"Content-Type": "application/xml"})
        if not (self.folder / name).is_file():
            return self.answer(404, b"")
        content = (self.folder / name).read_bytes()
        if "Range" not in self.headers:
            return self.answer(200, content)
        self.asked.append(name)
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = content[int(first) : int(last) + 1]
        return self.answer(206, part, {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"})

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "ETag": '"x"', **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format, *arguments):
        pass


@pytest.fixture
def bucket(elsewhere):
    handler = type("Bucket", (_Bucket,), {"folder": elsewhere, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = f"endpoint_override=127.0.0.1%3A{server.server_port}&scheme=http&region=here"
    yield f"s3://key:secret@bucket/rows?{options}", handler.asked
    server.shutdown()
    server.server_close()


def test_request_rows_in_a_bucket_are_those_of_a_folder_and_fetched_once(loaded, elsewhere, bucket, tmp_path, monkeypatch):
    url, asked = bucket
    monkeypatch.setattr(request_rows, "FILE_ROWS", 1000)
    elsewhere.rmdir()
    request_rows.write(request_rows.requests_of(loaded, loaded.train_rows), elsewhere, {}, group_rows=250)
    here, there = RequestRows(elsewhere), RequestRows(Shards(url, Cache(tmp_path / "cache", 10 * MB)))
    assert there.fingerprint == here.fingerprint
    assert there.columns == here.columns
    for group in reversed(range(len(here.group_sizes))):
        assert there.table(group).equals(here.table(group))
    shards = [name for name in asked if name.endswith(".parquet")]
    assert len(here.manifest["files"]) > 1
    once = len(shards)
    again = RequestRows(Shards(url, Cache(tmp_path / "cache", 10 * MB)))
    assert again.table(0).equals(here.table(0))
    assert len([name for name in asked if name.endswith(".parquet")]) == once
    with pytest.raises(HeadraceError, match=r"^s3://bucket/rows holds .* the cache .* may hold"):
        RequestRows(Shards(url, Cache(tmp_path / "small", 1000)))
    (elsewhere / "manifest.json").unlink()
    with pytest.raises(HeadraceError, match=r"^no request rows at s3://bucket/rows: manifest.json is missing"):
        RequestRows(Shards(url, Cache(tmp_path / "cache", 10 * MB)))


def test_training_reads_rows_and_export_from_elsewhere_and_gives_the_same_model(export, loaded, tmp_path):
    settings = TrainerSettings(cache_dir=str(tmp_path / "cache"))
    configs = replace(Configs(), l1=replace(Configs().l1, epochs=1))
    plain = train(loaded, ["l1"], configs, 0, Registry(tmp_path / "a"), lambda *a: None, Options(work=tmp_path / "work"))
    rows_at = (tmp_path / "work" / "request_rows").as_uri()
    configs = replace(configs, trainer=replace(settings, request_rows=rows_at))
    cached = train(loaded, ["l1"], configs, 0, Registry(tmp_path / "b"), lambda *a: None)
    assert cached["versions"] == plain["versions"]
    other = replace(loaded, manifest={**loaded.manifest, "dataset": "another"})
    with pytest.raises(HeadraceError, match=r"trainer.request_rows: the rows at .* are of the export"):
        train(other, ["l1"], configs, 0, Registry(tmp_path / "c"), lambda *a: None)


def test_an_export_at_a_url_is_the_one_in_the_folder(loaded, export, tmp_path, monkeypatch):
    folder = tmp_path / "export"
    folder.mkdir()
    for entry in export.iterdir():
        (folder / entry.name).write_bytes(entry.read_bytes())
    with pytest.raises(HeadraceError, match=r"manifest.json has no SHA-256 of examples.parquet"):
        examples.load(folder.as_uri(), Cache(tmp_path / "cache", 10 * MB))
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.parquet"))}
    (folder / "manifest.json").write_text(json.dumps({**loaded.manifest, "files": files}))
    there = examples.load(folder.as_uri(), Cache(tmp_path / "cache", 10 * MB))
    assert there.words.equals(loaded.words)
    assert np.array_equal(there.values_RF, loaded.values_RF, equal_nan=True)
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    scored, _ = examples.load_spine(folder / "examples.parquet", folder.as_uri())
    assert scored.notes.equals(loaded.notes)
    of_dimensions = {files["notes.parquet"], files["users.parquet"]}
    assert {entry.stem for entry in (tmp_path / "home" / "cache").glob("*.parquet")} == of_dimensions
    with pytest.raises(HeadraceError, match="what://x cannot be opened"):
        examples.load("what://key:secret@x?more", Cache(tmp_path / "cache", 10 * MB))


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:sEcr/et@bucket/rows",  # its slash should have been %2F
        "s3://key:sEcr et@bucket/rows",
        "s3://key:sEcret@bucket/rows?what=sEcret",
        "s3://key:sEcret@bucket/rows?scheme=sEcret",
        "what://key:sEcret@x?token=sEcret",
    ],
)
def test_what_is_said_of_a_url_holds_no_secret(url):
    with pytest.raises(HeadraceError, match=r"cannot be opened: .+") as failed:
        Shards(url)
    assert "sEcr" not in "".join(traceback.format_exception(failed.value))
    assert str(failed.value).startswith(f"{told(url)} cannot")
    assert "Install" not in str(failed.value)
