"""The one exception whose message is meant for the person at the keyboard, and the one condition every writer can meet."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

_DISK_FULL = ("no space left on device", "disk quota exceeded", "database or disk is full")
"""How the libraries that write for us word it when they keep the errno to themselves."""


class HeadraceError(Exception):
    """What a user did or can mend: what is wrong, where, and what would be right.

    The command line prints the message alone (no traceback) and exits with 2; the server answers 4xx or 503 with it.
    """


@contextlib.contextmanager
def disk_full_said(folder: Path) -> Iterator[None]:
    """Says in one sentence that the disk under `folder` is full, whichever library met it. Commits are atomic, so what was
    under way can be repeated."""
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise HeadraceError(
            f"no space is left on the disk of {folder}; no table was left half-written: "
            "make room there (or point HEADRACE_HOME elsewhere) and run the same command again"
        ) from error


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether the error, or one that it was raised from, is about space."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error).lower() for words in _DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
