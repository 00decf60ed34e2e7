"""Immutable, checksummed model versions on a file system, and aliases that flip atomically.

`<root>/<name>/<version>/` holds a model's files and its `manifest.json`; `<root>/<name>/<alias>` is a file that holds a
version. A version is `NNNN-` (a counter) and the first 12 hex digits of the SHA-256 of its content, manifest included, so
that neither a file nor the manifest can change unnoticed. Knows nothing of what the files mean.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from warehouse.durable import replace_file, sync_folder, write_durably
from warehouse.errors import HeadraceError

MANIFEST = "manifest.json"
SAFE_SUFFIXES = (".safetensors", ".parquet", ".json")
"""Formats that hold data only. Pickle and its relatives run code when they are read, so they are refused."""

_NAME = re.compile(r"^[a-z][a-z0-9_]*$")
_VERSION = re.compile(r"^[0-9]{4,}-[0-9a-f]{12}$")


class Registry:
    """All versions of all models under one folder. Safe for several publishing and reading processes."""

    def __init__(self, root: Path | str):
        self.root = Path(root)

    def publish(self, name: str, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> str:
        """Writes a new version, all or nothing, and returns it; the same content again returns the version there is.

        files: file name -> content; names end in `.safetensors`, `.parquet` or `.json`.
        manifest: what a reader should know (feature names, metrics, ...), JSON; `name` and `files` (sha256 and bytes) are
        added. Raises HeadraceError for a bad name or suffix, and when the disk refuses.
        """
        self._check_name(name, "model name")
        if not files:
            raise HeadraceError(f"model {name}: a version needs at least one file")
        for file_name in files:
            if Path(file_name).name != file_name or Path(file_name).suffix not in SAFE_SUFFIXES or file_name == MANIFEST:
                raise HeadraceError(
                    f"model {name}: file {file_name!r} cannot be published; "
                    f"give a bare name that ends in {', '.join(SAFE_SUFFIXES)} and is not {MANIFEST}"
                )
        described = {
            file_name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for file_name, content in files.items()
        }
        manifest_bytes = _to_json({**manifest, "name": name, "files": described})
        digest = hashlib.sha256(manifest_bytes).hexdigest()[:12]
        folder = self.root / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for version in self.versions(name):
                if version.endswith(digest):
                    self._check(name, version)
                    return version
            return self._write_version(folder, digest, {**files, MANIFEST: manifest_bytes})
        except OSError as error:
            raise HeadraceError(f"model {name}: cannot write a version under {folder}: {error}") from error

    def names(self) -> list[str]:
        """Models that have a version."""
        folders = self.root.iterdir() if self.root.is_dir() else ()
        return sorted(folder.name for folder in folders if _NAME.match(folder.name) and self.versions(folder.name))

    def aliases(self, name: str) -> dict[str, str]:
        """Alias -> version."""
        files = (entry for entry in (self.root / name).iterdir() if entry.is_file() and _NAME.match(entry.name))
        return {entry.name: self.resolve(name, entry.name) for entry in sorted(files)}

    def versions(self, name: str) -> list[str]:
        """Oldest first."""
        folder = self.root / name
        if not folder.is_dir():
            return []
        return sorted((entry.name for entry in folder.iterdir() if _VERSION.match(entry.name)), key=_number_of)

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Points `alias` at a version that exists and is whole; readers see the old one or the new one, nothing between."""
        self._check_name(alias, "alias")
        self._check(name, version)
        replace_file(self.root / name / alias, (version + "\n").encode())

    def promote(self, name: str, version: str) -> None:
        """Makes a version `production`; the one that was becomes `previous`. After a crash between the two flips `production`
        is still the old one and the call may be repeated."""
        self._check(name, version)
        now = self.production(name)
        if now == version:
            return
        if now is not None:
            self.set_alias(name, "previous", now)
        self.set_alias(name, "production", version)

    def production(self, name: str) -> str | None:
        """The version in production, None before there is one."""
        return self.resolve(name) if (self.root / name / "production").is_file() else None

    def find(self, reference: str) -> tuple[str, str]:
        """(name, version) of `l2`, `l2@candidate`, `l2@0003` or `l2@0003-0123456789ab`; without a version the one in
        production. Raises HeadraceError that lists what there is."""
        name, _, wanted = reference.partition("@")
        self._check_name(name, "model name")
        if wanted.isdigit():
            found = [version for version in self.versions(name) if _number_of(version) == int(wanted)]
            if len(found) != 1:
                have = ", ".join(self.versions(name)) or "none"
                raise HeadraceError(f"model {name} has {len(found)} versions numbered {wanted}; it has {have}")
            return name, found[0]
        version = self.resolve(name, wanted or "production")
        self._check(name, version)
        return name, version

    def resolve(self, name: str, alias_or_version: str = "production") -> str:
        """The version an alias points at; a version stands for itself."""
        if _VERSION.match(alias_or_version):
            return alias_or_version
        self._check_name(alias_or_version, "alias")
        path = self.root / name / alias_or_version
        try:
            version = path.read_text().strip()
        except FileNotFoundError:
            raise HeadraceError(
                f"model {name} has no {alias_or_version!r} version in {self.root}; run: headrace train {name}"
            ) from None
        if not _VERSION.match(version):
            raise HeadraceError(f"alias file {path} must hold a version such as 0001-0123456789ab, it holds {version[:40]!r}")
        return version

    def path(self, name: str, alias_or_version: str = "production") -> Path:
        """The folder of a version after checking every file's sha256 against its manifest.

        Raises HeadraceError when there is no such version or anything in it has changed.
        """
        version = self.resolve(name, alias_or_version)
        self._check(name, version)
        return self.root / name / version

    def manifest(self, name: str, alias_or_version: str = "production") -> dict[str, Any]:
        """The manifest of a version, as published."""
        return json.loads((self.path(name, alias_or_version) / MANIFEST).read_bytes())

    def _check(self, name: str, version: str) -> None:
        folder = self.root / name / version
        known = ", ".join(self.versions(name)) or "none"
        if not _VERSION.match(version) or not (folder / MANIFEST).is_file():
            raise HeadraceError(f"model {name} has no version {version!r} in {self.root}; it has {known}")
        manifest_bytes = (folder / MANIFEST).read_bytes()
        if hashlib.sha256(manifest_bytes).hexdigest()[:12] != version.rpartition("-")[2]:
            raise HeadraceError(f"{folder / MANIFEST} is not what was published; {_WAY_OUT}")
        described = json.loads(manifest_bytes)["files"]
        present = {entry.name for entry in folder.iterdir()} - {MANIFEST}
        for file_name in sorted(present ^ set(described)):
            problem = "was not published with it" if file_name in present else "is missing"
            raise HeadraceError(f"{folder / file_name} {problem}; {_WAY_OUT}")
        for file_name, expected in described.items():
            with (folder / file_name).open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != expected["sha256"]:
                raise HeadraceError(f"{folder / file_name} has sha256 {found}, published {expected['sha256']}; {_WAY_OUT}")

    def _write_version(self, folder: Path, digest: str, contents: Mapping[str, bytes]) -> str:
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder))
        try:
            for file_name, content in contents.items():
                write_durably(draft / file_name, content)
            draft.chmod(0o755)
            # two publishers at once may take the same number; their contents differ, so their folders do too
            number = max((_number_of(version) for version in self.versions(folder.name)), default=0) + 1
            version = f"{number:04d}-{digest}"
            os.rename(draft, folder / version)
            sync_folder(folder)
            return version
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    @staticmethod
    def _check_name(name: str, what: str) -> None:
        if not _NAME.match(name):
            raise HeadraceError(f"{what} must be lower-case letters, digits and underscores, got {name!r}")


_WAY_OUT = "delete this version, train again, or point the alias at an older version"


def _number_of(version: str) -> int:
    return int(version.partition("-")[0])


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
