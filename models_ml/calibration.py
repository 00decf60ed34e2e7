"""Slope and intercept that make a ranker's probabilities true on days it has not seen, folded into its last layer.

`rehearsed` holds the last day before `test_start` back, trains on what comes before, and fits both on that day; the model that
is published learns from every day and takes them over.
A network that fits its training days is too sure of itself on the next. Per head, logits z become slope * z + intercept; both
are fitted by maximum likelihood on rows the network did not learn from. Order, and so AUC, hardly moves (with one member, not
at all).
K members, R rows. Sources: Platt 1999; Guo et al., ICML 2017.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from models_ml.examples import Examples
from models_ml.l2 import L2

DAY_US = 86_400_000_000
_SMALLEST_SLOPE = 0.05


def fit(logits_KR: np.ndarray, labels_R: np.ndarray) -> tuple[float, float]:
    """(slope, intercept) of the least log loss of mean over K of sigmoid(slope * logits + intercept).

    (1, 0) without both classes. A weak pull to slope 1 keeps a head with a handful of positives near what the network says.
    """
    labels_R = np.asarray(labels_R, dtype=np.float64)
    positives = float(labels_R.sum())
    if positives == 0 or positives == len(labels_R):
        return 1.0, 0.0
    logits_KR = np.asarray(logits_KR, dtype=np.float64)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope, intercept = parameters
        member_KR = expit(slope * logits_KR + intercept)
        probability_R = member_KR.mean(0).clip(1e-12, 1 - 1e-12)
        value = -(labels_R * np.log(probability_R) + (1 - labels_R) * np.log1p(-probability_R)).sum()
        outer_R = (probability_R - labels_R) / (probability_R * (1 - probability_R))
        inner_KR = member_KR * (1 - member_KR) / len(logits_KR)
        gradient = np.array([(outer_R * (inner_KR * logits_KR).sum(0)).sum(), (outer_R * inner_KR.sum(0)).sum()])
        value += _PULL * (slope - 1) ** 2
        gradient[0] += 2 * _PULL * (slope - 1)
        return value, gradient

    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(_SMALLEST_SLOPE, None), (None, None)])
    return float(found.x[0]), float(found.x[1])


def rehearsed(examples: Examples, train: Callable[[Examples], L2], days: float = 1.0) -> dict[str, tuple[float, float]]:
    """Head -> (slope, intercept), as `L2.rescale` takes them. train: examples to a model, with the settings of the real one.

    Empty where fewer than two days come before `test_start`, or nothing was shown in the days held back.
    """
    start_us = examples.test_start_us - round(days * DAY_US)
    rows = np.flatnonzero(examples.is_train & (examples.request_us_R >= start_us))
    if len(rows) == 0 or (examples.request_us_R < start_us).sum() < len(rows):
        return {}
    model = train(replace(examples, test_start_us=start_us))
    logits_KRT = model.logits_rows(examples, rows).numpy()
    return {head: fit(logits_KRT[..., column], examples.labels[head][rows]) for column, head in enumerate(model.heads)}


_PULL = 10.0
"""Nats for a slope that is off by 1: what some dozens of positives outweigh."""
