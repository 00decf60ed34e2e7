"""A folder of files known by their SHA-256, on this machine or elsewhere; what lies elsewhere is copied here once.

A place is a folder or a URL that pyarrow opens (s3://, gs://, hdfs://, file://) or, with the package that its scheme needs,
fsspec (memory://, http:// …). In a cache's folder:

<sha256>.parquet    whole and checked; who reads it holds it shared, so nobody else takes it away for room
.draft-…            being fetched, held by who fetches it, at its full length, so that its room is taken
.<sha256>.lock      held by who looks for the file or fetches it: the others wait, and then find it
"""

import contextlib
import fcntl
import hashlib
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa
from pyarrow import fs

from warehouse import locks
from warehouse.durable import sync_folder
from warehouse.errors import HeadraceError
from warehouse.home import Home

MOST_GB = 50.0
_CHUNK = 1 << 20
_ATTEMPTS = 3
_AHEAD = 2
"""Files that are fetched at a time before anybody asks for them."""


@dataclass(frozen=True)
class Shard:
    """One file, as a manifest describes it."""

    name: str
    sha256: str
    num_bytes: int


class Changed(HeadraceError):  # noqa: N818  (it names what happened to the file)
    """The file is not what the manifest says."""

    def __init__(self, path: Path | str, found: str, shard: Shard):
        super().__init__(f"{path} has changed: its SHA-256 is {found}, the manifest says {shard.sha256}")


class Cache:
    """A folder of copies that any number of threads and processes share. most_bytes: of all of them; those unused for longest
    make room. What was asked of a Cache stays as long as that object lives."""

    def __init__(self, folder: Path, most_bytes: int):
        self.folder, self.most_bytes = folder, most_bytes
        self._held: dict[str, IO[bytes]] = {}
        weakref.finalize(self, _close, self._held)
        with _written(folder):
            folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def of(folder: str = "", most_gb: float = MOST_GB) -> "Cache":
        """folder: `cache/` of the Headrace home when it is empty."""
        return Cache(Path(folder).expanduser().resolve() if folder else Home.from_env().path / "cache", int(most_gb * 1e9))

    def local(self, shard: Shard, files: fs.FileSystem, source: str) -> Path:
        """The copy, its SHA-256 checked since this process began; fetched when it is absent or damaged.

        source: its path in `files`. Raises HeadraceError: it cannot be read, is not what the manifest says, there is no room.
        """
        path = self.folder / f"{shard.sha256}.parquet"
        if path.name in self._held:
            return path
        with locks.in_turn(self.folder / f".{shard.sha256}.lock"):
            if path.name not in self._held:
                handle = _held(path, shard)
                if handle is None:
                    self._fetch(shard, files, source, path)
                    handle = _held(path)
                if handle is None:
                    raise self._no_room(shard.num_bytes)
                self._held[path.name] = handle
        return path

    def require_room(self, shards: Iterable[Shard], where: str) -> None:
        """Raises HeadraceError when these files could never lie here together."""
        wanted = sum({shard.sha256: shard.num_bytes for shard in shards}.values())
        if wanted > self.most_bytes:
            raise HeadraceError(
                f"{where} holds {wanted / 1e9:.3g} GB, the cache {self.folder} may hold {self.most_bytes / 1e9:.3g}: "
                "raise trainer.cache_dir_gb"
            )

    def _fetch(self, shard: Shard, files: fs.FileSystem, source: str, path: Path) -> None:
        for attempt in range(_ATTEMPTS):
            time.sleep(0.1 * attempt)
            draft, stream = self._draft(shard.num_bytes)
            try:
                with stream:
                    self._copy(shard, files, source, stream)
                    with _written(self.folder):
                        os.fsync(stream.fileno())
                        draft.rename(path)
                        sync_folder(self.folder)
                return
            except (OSError, pa.ArrowException, Changed) as error:
                draft.unlink(missing_ok=True)
                if isinstance(error, FileNotFoundError) or attempt == _ATTEMPTS - 1:
                    raise error if isinstance(error, Changed) else HeadraceError(f"{source} cannot be read: {error}") from error
            except BaseException:
                draft.unlink(missing_ok=True)
                raise

    def _copy(self, shard: Shard, files: fs.FileSystem, source: str, stream: IO[bytes]) -> None:
        digest = hashlib.sha256()
        with files.open_input_stream(source) as remote:
            while chunk := remote.read(_CHUNK):
                digest.update(chunk)
                if stream.tell() + len(chunk) > shard.num_bytes:
                    break  # no room was taken for more
                with _written(self.folder):
                    left = memoryview(chunk)
                    while left:
                        left = left[stream.write(left) :]
        if digest.hexdigest() != shard.sha256:
            raise Changed(source, digest.hexdigest(), shard)

    def _draft(self, num_bytes: int) -> tuple[Path, IO[bytes]]:
        """A file of this length, held alone, once there is room for it."""
        with _written(self.folder), locks.in_turn(self.folder / ".room"):
            self._make_room(num_bytes)
            descriptor, name = tempfile.mkstemp(prefix=".draft-", dir=self.folder)
            stream = os.fdopen(descriptor, "r+b", buffering=0)
            try:
                fcntl.flock(stream, fcntl.LOCK_EX)
                os.fchmod(descriptor, 0o644)
                stream.truncate(num_bytes)
            except BaseException:
                stream.close()
                os.unlink(name)
                raise
            return Path(name), stream

    def _make_room(self, num_bytes: int) -> None:
        found = []
        for entry in self.folder.iterdir():
            if entry.name.startswith(".draft-") or entry.suffix == ".parquet":
                with contextlib.suppress(FileNotFoundError):
                    found.append((entry, entry.stat()))
        excess = sum(about.st_size for _, about in found) + num_bytes - self.most_bytes
        # a draft that nobody holds was left by somebody who was killed
        for entry, about in sorted(found, key=lambda pair: (not pair[0].name.startswith(".draft-"), pair[1].st_mtime_ns)):
            if (excess > 0 or entry.name.startswith(".draft-")) and _removed(entry):
                excess -= about.st_size
        if excess > 0:
            raise self._no_room(num_bytes)

    def _no_room(self, num_bytes: int) -> HeadraceError:
        return HeadraceError(
            f"the cache {self.folder} may hold {self.most_bytes / 1e9:.3g} GB and is full of files in use; another "
            f"{num_bytes / 1e9:.3g} GB are needed: raise trainer.cache_dir_gb, or wait until other trainings end"
        )


class Shards:
    """A place of files. cache: copies come from it; without one those of a URL come from the home's, and those of a folder
    are read where they lie. Raises HeadraceError for a URL that nothing here opens."""

    def __init__(self, where: str | Path, cache: Cache | None = None):
        self.told = told(where)
        is_url = "://" in str(where)
        self._cache = cache or (Cache.of() if is_url else None)
        self._files, self._root = _opened(str(where)) if is_url else (fs.LocalFileSystem(), str(Path(where).absolute()))
        self._checked: set[str] = set()
        self._lock = threading.Lock()

    @property
    def is_cached(self) -> bool:
        """Whether files are read from copies."""
        return self._cache is not None

    def path(self, name: str) -> str:
        """What a person is told."""
        return f"{self.told.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """A small file, as it is now. Raises FileNotFoundError, OSError."""
        with self._files.open_input_stream(f"{self._root}/{name}") as stream:
            return stream.read()

    def sizes(self) -> dict[str, int]:
        """Bytes of each file here. Raises OSError."""
        found = self._files.get_file_info(fs.FileSelector(self._root))
        return {entry.base_name: entry.size for entry in found if entry.type == fs.FileType.File}

    def local(self, shard: Shard) -> Path:
        """Where it can be read on this machine, its SHA-256 checked the first time. Raises Changed, HeadraceError, OSError."""
        if self._cache is not None:
            return self._cache.local(shard, self._files, f"{self._root}/{shard.name}")
        path = Path(self._root) / shard.name
        with self._lock:
            if shard.name not in self._checked:
                with path.open("rb") as stream:
                    found = hashlib.file_digest(stream, "sha256").hexdigest()
                if found != shard.sha256:
                    raise Changed(path, found, shard)
                self._checked.add(shard.name)
        return path

    def require_room(self, shards: Sequence[Shard]) -> None:
        """Raises HeadraceError when a cache could never hold them all."""
        if self._cache is not None:
            self._cache.require_room(shards, self.told)

    def fetch_ahead(self, shards: Sequence[Shard]) -> None:
        """Begins to fetch what a cache lacks, in this order, and returns. What cannot be fetched is for the reader to meet."""
        if self._cache is None:
            return
        waiting, lock = iter(shards), threading.Lock()

        def fetch() -> None:
            while True:
                with lock:
                    shard = next(waiting, None)
                if shard is None:
                    return
                with contextlib.suppress(HeadraceError, OSError):
                    self.local(shard)

        for number in range(min(_AHEAD, len(shards))):
            threading.Thread(target=fetch, name=f"shards-{number}", daemon=True).start()


def told(where: str | Path) -> str:
    """The place as a person is told of it: a URL without its keys, which stand before the last @ or behind a question mark. (A
    secret may hold a slash, although it must not.)"""
    scheme, sep, rest = str(where).partition("://")
    return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}" if sep else scheme


def _opened(url: str) -> tuple[fs.FileSystem, str]:
    try:
        try:
            files, root = fs.FileSystem.from_uri(url)
        except pa.ArrowInvalid as error:
            if "Unrecognized filesystem type" not in str(error):
                raise
            files, root = fs.FileSystem.from_uri(f"fsspec+{url}")
    except (OSError, ValueError, ImportError, pa.ArrowException) as error:
        reason = _without_keys(str(error), url)
        raise HeadraceError(f"{told(url)} cannot be opened: {reason}") from None  # which would be printed whole
    return files, root.rstrip("/")


def _without_keys(text: str, url: str) -> str:
    """What a library says of a URL, and may quote it."""
    before_query, _, query = url.partition("://")[2].partition("?")
    keys = before_query.rpartition("@")[0]
    text = text.replace(url, told(url))
    for secret in (keys, keys.partition(":")[2], query):
        text = text.replace(secret, "...") if secret else text
    return text


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Says which cache it is that cannot be written: a disk that is full, a folder that is another's."""
    try:
        yield
    except OSError as error:
        raise HeadraceError(
            f"the cache {folder} cannot be written: {error.strerror}; make room there, or set trainer.cache_dir"
        ) from error


def _close(held: dict[str, IO[bytes]]) -> None:
    for handle in held.values():
        handle.close()


def _held(path: Path, check: Shard | None = None) -> IO[bytes] | None:
    """The file, held shared and marked as used; None if it is absent or, when checked, not what the manifest says."""
    try:
        handle = path.open("rb")
    except FileNotFoundError:
        return None
    with contextlib.ExitStack() as unless_kept:
        unless_kept.callback(handle.close)
        fcntl.flock(handle, fcntl.LOCK_SH)
        if os.fstat(handle.fileno()).st_nlink == 0:  # taken away before it was held
            return None
        if check is not None and hashlib.file_digest(handle, "sha256").hexdigest() != check.sha256:
            return None
        os.utime(handle.fileno())
        unless_kept.pop_all()
    return handle


def _removed(path: Path) -> bool:
    """Whether nobody held it; then it is gone."""
    try:
        with path.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True
