"""The caches of the cascade: what each keeps, for how long, and what it depends on.

| cache | key | kept for | never outlives |
|---|---|---|---|
| candidates | reader, feed type, place, page size | `candidate_cache_s` | its tick, the reader's next event |
| l1 | the same, and what the request says of itself | `l1_cache_s` | its candidates |
| user | reader | `user_cache_s` | its blocks and 5 minutes, the reader's next event |

Candidates and L1's scores are of one set of loaded models, too. Features of notes need no cache: the store assembles them once
a tick (`streaming_sql.assembled`).
"""

from dataclasses import dataclass

import numpy as np

from serving.cache import Cache
from serving.hydrate import UserFeatures
from serving.retrieve import Candidates
from serving.settings import Settings

CACHES = ("candidates", "l1", "user")


@dataclass(frozen=True)
class Found:
    """Candidates, and what was said of them in `degraded`."""

    candidates: Candidates
    degraded: tuple[str, ...]


@dataclass(frozen=True)
class Scored:
    """L1's scores [C] of these candidates."""

    candidates: Candidates
    l1_score_C: np.ndarray


class Caches:
    """Safe from several threads."""

    def __init__(self, settings: Settings):
        size = settings.cached_readers
        self.candidates: Cache[Found] = Cache(size, settings.candidate_cache_s)
        self.l1: Cache[Scored] = Cache(size, settings.l1_cache_s)
        self.user: Cache[UserFeatures] = Cache(size, settings.user_cache_s)

    def by_name(self) -> dict[str, Cache]:
        return {name: getattr(self, name) for name in CACHES}
