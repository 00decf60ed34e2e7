"""What was computed a moment ago, kept for whoever asks next: bounded, timed, each value made once however many wait for it.

An entry carries what it depends on (its tick, how many events of its reader there were): one that depends on something else by
now is never given out, however young. Knows nothing of what it keeps.
"""

import threading
import time
from collections.abc import Callable, Generator, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cachetools import TTLCache

from serving.company import Path

Value = TypeVar("Value")


class Same:
    """Equal to itself alone, and keeps what it stands for from being made anew at the same address."""

    def __init__(self, what: object):
        self.what = what

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.what is self.what

    def __hash__(self) -> int:
        return id(self.what)


@dataclass(frozen=True)
class _Entry(Generic[Value]):
    depends_on: Hashable
    value: Value


class Cache(Generic[Value]):
    """At most `size` entries, the one used longest ago goes first; each for `seconds`. 0 of either keeps nothing."""

    def __init__(self, size: int, seconds: float, timer: Callable[[], float] = time.monotonic):
        self._entries: TTLCache[Hashable, _Entry[Value]] = TTLCache(max(size, 1), seconds, timer)
        self._is_on = size > 0 and seconds > 0
        self._under_way: dict[tuple[Hashable, Hashable], Future[tuple[Value, bool]]] = {}
        self._lock = threading.Lock()
        self.num_hits = self.num_misses = self.num_shared = 0

    def __len__(self) -> int:
        with self._lock:
            self._entries.expire()
            return len(self._entries)

    def get(self, key: Hashable, depends_on: Hashable, make: Callable[[], tuple[Value, bool]]) -> tuple[Value, bool]:
        """(the value, whether it was there or came from another's making). make: → (value, whether to keep it).

        Who asks while the same is being made waits for it; a value that is not to be kept, or a making that fails, is its
        maker's alone, and those who waited make their own.
        """
        path = self.path(key, depends_on, _path_of(make))
        try:
            while True:
                theirs = next(path)
                assert isinstance(theirs, Future)  # `make` asks no model
                theirs.exception()  # waits for it
        except StopIteration as end:
            return end.value

    def path(
        self, key: Hashable, depends_on: Hashable, make: Callable[[], Path[tuple[Value, bool]]]
    ) -> Path[tuple[Value, bool]]:
        """`get` for one that is made on a path."""
        if not self._is_on:
            self.num_misses += 1
            value, _ = yield from make()
            return value, False
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.depends_on == depends_on:
                self.num_hits += 1
                return entry.value, True
            theirs = self._under_way.get((key, depends_on))
            if theirs is None:
                self.num_misses += 1
                own: Future[tuple[Value, bool]] = Future()
                self._under_way[key, depends_on] = own
        if theirs is not None:
            return (yield from self._shared(theirs, make))
        try:
            value, is_kept = yield from make()
        except BaseException as error:
            with self._lock:
                del self._under_way[key, depends_on]
            own.set_exception(error)
            raise
        with self._lock:
            if is_kept:
                self._entries[key] = _Entry(depends_on, value)
            del self._under_way[key, depends_on]
        own.set_result((value, is_kept))
        return value, False

    def _shared(
        self, theirs: "Future[tuple[Value, bool]]", make: Callable[[], Path[tuple[Value, bool]]]
    ) -> Path[tuple[Value, bool]]:
        yield theirs
        try:
            value, is_kept = theirs.result()
        except Exception:  # theirs to report
            is_kept = False
        with self._lock:
            if is_kept:
                self.num_shared += 1
            else:
                self.num_misses += 1
        if is_kept:
            return value, True
        value, _ = yield from make()
        return value, False


def _path_of(make: Callable[[], tuple[Value, bool]]) -> Callable[[], Path[tuple[Value, bool]]]:
    def path() -> Generator[Any, Any, tuple[Value, bool]]:
        return make()
        yield  # never reached: it makes this a path

    return path
