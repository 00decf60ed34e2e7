"""What comes to a request from outside the lake: what its caller says of it, and what other services answer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from serving.fetch import Fetcher
from serving.hydrate import UserFeatures
from warehouse.errors import HeadraceError
from warehouse.features.kinds.declared import Kinds
from warehouse.features.kinds.values import Value


def said(kinds: Kinds, context: Mapping[str, Any]) -> dict[str, Value]:
    """Each declared feature of the request, by its key in `context`; the empty value where the caller says nothing.

    Raises HeadraceError for a value of another type, naming the key and what would be right. Undeclared keys are not read.
    """
    values = {}
    for feature in kinds.request:
        try:
            values[feature.context_key] = feature.value.checked(context.get(feature.context_key))
        except HeadraceError as error:
            raise HeadraceError(f"context.{feature.context_key}: {error}") from None
    return values


def with_outside(
    user: UserFeatures,
    kinds: Kinds,
    fetcher: Fetcher | None,
    keys: Mapping[str, str | None],
    values: Mapping[str, Value],
    degraded: list[str],
) -> UserFeatures:
    """The reader's features and, behind them, those of the request. keys: what a URL may name of the request itself; values: of
    `said`. A call that failed gives its default, and its name goes into `degraded` as `http:<feature>`."""
    names: list[str] = []
    numbers: list[float] = []
    for feature in kinds.request:
        names += feature.value.inputs
        numbers += feature.value.numbers(values.get(feature.context_key, feature.value.empty))
    if fetcher is not None:
        fetched = fetcher.fetch({**{key: _text(value) for key, value in values.items()}, **keys})
        for called in kinds.http:
            one = fetched[called.value.name]
            names += called.inputs
            numbers += [*called.value.numbers(one.value), float(one.is_default)]
            if one.failure is not None:
                degraded.append(f"http:{called.value.name}")
    return replace(user, names=(*user.names, *names), values_F=np.concatenate([user.values_F, np.array(numbers)]))


def _text(value: Value) -> str | None:
    return None if value is None else str(value).lower() if isinstance(value, bool) else str(value)
