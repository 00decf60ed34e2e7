"""Loops that NumPy would take many calls for, compiled when their module is imported. The machine code is kept beside the
source or in the user's cache (`NUMBA_CACHE_DIR` names another place), so that only the first import takes seconds."""

import logging
from collections.abc import Callable
from typing import Any

from numba import njit, types

log = logging.getLogger(__name__)


def only_read(dtype: types.Type, ndim: int = 1) -> types.Array:
    """Arrays of this type, contiguous by rows, which the loop does not write: those that cannot be written are taken too."""
    return types.Array(dtype, ndim, "C", readonly=True)


def compiled(signature: Any, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`numba.njit` of one signature, which lets other threads run. Where machine code can be neither kept nor read (no folder
    that can be written, a file that names what is no longer there) it compiles all the same, at every start. options: numba's.

    The cache is made anew when the function's own file changes, and for nothing else: numbers and functions of other files
    must come as arguments."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(signature, cache=True, nogil=True, **options)(function)
        except (RuntimeError, ImportError, AttributeError, OSError) as error:  # what is wrong with the loop itself comes again
            log.info("%s is compiled at every start, its machine code cannot be kept: %s", function.__qualname__, error)
            return njit(signature, nogil=True, **options)(function)

    return make
