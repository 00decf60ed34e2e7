"""Files that are whole or absent after a crash: written, synced, then renamed."""

import os
import tempfile
from pathlib import Path

from warehouse.errors import HeadraceError


def write_durably(path: Path, *parts: bytes | memoryview) -> None:
    """Returns when the disk has it; the name itself is durable once `sync_folder` has run."""
    with path.open("wb") as stream:
        for part in parts:
            stream.write(part)
        stream.flush()
        os.fsync(stream.fileno())


def replace_file(path: Path, *parts: bytes | memoryview) -> None:
    """Readers see the old content or the new, nothing between."""
    descriptor, name = tempfile.mkstemp(prefix=".draft-", dir=path.parent)
    os.close(descriptor)
    draft = Path(name)
    try:
        write_durably(draft, *parts)
        draft.chmod(0o644)
        draft.replace(path)
        sync_folder(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_out(path: Path, *parts: bytes | memoryview) -> None:
    """`replace_file` for a path that a user gave: its folder is made. Raises HeadraceError saying why it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, *parts)
    except OSError as error:
        raise HeadraceError(f"{path} cannot be written: {error.strerror}; name another file, or make room there") from error


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
