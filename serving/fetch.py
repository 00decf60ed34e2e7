"""Features that another service answers at request time: all calls of a request at once, each within its own time, none fatal.

Only the hosts of the declarations are called, and a redirect is not followed. Whatever does not end in a JSON value of the
declared type, in time, is the declared default; the caller is told which.
"""

import asyncio
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any
from urllib.parse import quote

import httpx
import orjson

from warehouse.errors import HeadraceError
from warehouse.features.kinds.declared import HttpFeature
from warehouse.features.kinds.values import Value

log = logging.getLogger(__name__)

MOST_BYTES = 64 << 10
"""An answer longer than this is garbage."""
_STEP = re.compile(r"[^.\[\]]+")


@dataclass(frozen=True)
class Fetched:
    """One feature's value. failure: why it is the default; None if the service answered, or could not be asked for want of a
    key (then is_default alone says so)."""

    value: Value
    is_default: bool
    failure: str | None


class Fetcher:
    """Calls from any thread; one event loop and one pool of connections behind them. `close` when done."""

    def __init__(self, features: Sequence[HttpFeature]):
        self._features = tuple(features)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fetch", daemon=True)
        self._thread.start()
        self._client = httpx.AsyncClient(follow_redirects=False, trust_env=False, timeout=None)  # each call is timed as a whole

    def fetch(self, keys: Mapping[str, str | None]) -> dict[str, Fetched]:
        """By the feature's name, within the longest declared timeout. keys: what the URLs may name."""
        return asyncio.run_coroutine_threadsafe(self._all(keys), self._loop).result()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _all(self, keys: Mapping[str, str | None]) -> dict[str, Fetched]:
        found = await asyncio.gather(*(self._one(feature, keys) for feature in self._features))
        return {feature.value.name: value for feature, value in zip(self._features, found, strict=True)}

    async def _one(self, feature: HttpFeature, keys: Mapping[str, str | None]) -> Fetched:
        url = url_of(feature.url, keys)
        if url is None:
            return Fetched(feature.value.empty, True, None)
        try:
            async with asyncio.timeout(feature.timeout_ms / 1000):
                value = feature.value.checked(value_at(await self._json(url), feature.path))
        except TimeoutError:
            return Fetched(feature.value.empty, True, f"no answer within {feature.timeout_ms} ms")
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError, HeadraceError) as error:
            return Fetched(feature.value.empty, True, f"{type(error).__name__}: {error}"[:200])
        return Fetched(value, False, None)

    async def _json(self, url: str) -> Any:
        async with self._client.stream("GET", url) as answer:
            if answer.status_code != 200:
                raise ValueError(f"status {answer.status_code}")
            body = bytearray()
            async for piece in answer.aiter_bytes():
                body += piece
                if len(body) > MOST_BYTES:
                    raise ValueError(f"more than {MOST_BYTES} bytes")
        return orjson.loads(body)


def url_of(template: str, keys: Mapping[str, str | None]) -> str | None:
    """The URL with its keys escaped, so that none can leave its place; None if one of them is not known."""
    named = [field for _, field, _, _ in Formatter().parse(template) if field]
    if any(keys.get(field) is None for field in named):
        return None
    return template.format(**{field: quote(str(keys[field]), safe="") for field in named})


def value_at(content: Any, path: str) -> Any:
    """`results[0].score` in parsed JSON. Raises LookupError or TypeError where the path leads nowhere, ValueError at a null."""
    for step in _STEP.findall(path):
        content = content[int(step)] if isinstance(content, list) else content[step]
    if content is None:
        raise ValueError(f"{path} is null")
    return content
