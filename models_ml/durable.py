"""Files that are whole or absent after a crash: written, synced, then renamed."""

import os
import tempfile
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Returns when the disk has it; the name itself is durable once `sync_folder` has run."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Readers see the old content or the new, nothing between."""
    descriptor, draft = tempfile.mkstemp(prefix=".draft-", dir=path.parent)
    os.close(descriptor)
    try:
        write_durably(Path(draft), content)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
        sync_folder(path.parent)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
