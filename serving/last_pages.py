"""The last page of each reader, for a request that has no time left to make one. Bounded, and forgotten after some minutes."""

import threading
from collections import OrderedDict

from serving.served import Served
from warehouse.time_algebra import MINUTE_US


class LastPages:
    """Safe from several threads."""

    def __init__(self, size: int, minutes: float):
        self._size, self._longest_us = size, round(minutes * MINUTE_US)
        self._pages: OrderedDict[str, dict[str, Served]] = OrderedDict()  # reader -> feed type -> page
        self._lock = threading.Lock()

    def keep(self, served: Served) -> None:
        if not served.page or self._size == 0:
            return
        with self._lock:
            self._pages.setdefault(served.user_id, {})[served.feed_type] = served
            self._pages.move_to_end(served.user_id)
            while len(self._pages) > self._size:
                self._pages.popitem(last=False)

    def get(self, user_id: str, feed_type: str, t_us: int) -> Served | None:
        """The reader's last page of this kind, unless it is too old."""
        with self._lock:
            served = self._pages.get(user_id, {}).get(feed_type)
        return served if served is not None and 0 <= t_us - served.t_us <= self._longest_us else None

    def forget(self, user_id: str) -> None:
        """A reader's own new events make the page stale."""
        with self._lock:
            self._pages.pop(user_id, None)
