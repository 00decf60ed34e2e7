"""Slope and intercept that make a ranker's probabilities true on days it has not seen, folded into its last layer.

A network that fits its training days is too sure of itself on the next. Per head, logits z become slope * z + intercept; both
are fitted by maximum likelihood on rows the network did not learn from. Order, and so AUC, hardly moves (with one member, not
at all).
K members, R rows. Sources: Platt 1999; Guo et al., ICML 2017.
"""

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

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


_PULL = 10.0
"""Nats for a slope that is off by 1: what some dozens of positives outweigh."""
