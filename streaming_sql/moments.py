"""Count, mean and sum of squared deviations (n, mean, M2): the representation of variances, as float64 [..., 3].

Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979. Never the
difference of a sum of squares and a squared sum, which cancels. n of a float64 is exact to 2**53.
"""

import numpy as np

NOTHING = (0.0, 0.0, 0.0)


def merged(left_N3: np.ndarray, right_N3: np.ndarray) -> np.ndarray:
    """The moments of both sets together."""
    n = left_N3[:, 0] + right_N3[:, 0]
    share = np.divide(right_N3[:, 0], n, out=np.zeros(len(n)), where=n > 0)
    apart = right_N3[:, 1] - left_N3[:, 1]
    mean = np.where(left_N3[:, 0] > 0, left_N3[:, 1] + apart * share, right_N3[:, 1])
    return np.stack([n, mean, left_N3[:, 2] + right_N3[:, 2] + apart * apart * left_N3[:, 0] * share], axis=1)


def merged_by(values_E3: np.ndarray, first: np.ndarray) -> np.ndarray:
    """float64 [len(first), 3]: the rows from each of `first` to the next one, merged. first: ascending, none repeated."""
    if not len(first):
        return np.zeros((0, 3))
    group = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(values_E3))))
    n, mean, m2 = values_E3[:, 0], values_E3[:, 1], values_E3[:, 2]
    held = np.where(n > 0, np.arange(len(n)), -1)
    origin = mean[np.maximum(np.maximum.reduceat(held, first), 0)]  # any mean of the group keeps the digits of its spread
    total = np.add.reduceat(n, first)
    from_origin = np.where(n > 0, mean - origin[group], 0.0)
    shift = np.divide(np.add.reduceat(n * from_origin, first), total, out=np.zeros(len(first)), where=total > 0)
    spread = np.add.reduceat(m2 + n * (from_origin - shift[group]) ** 2, first)
    return np.stack([total, origin + shift, spread], axis=1)


def variance(values_N3: np.ndarray) -> np.ndarray:
    """float64 [N]: the sample variance (n - 1), NaN where n < 2."""
    n = values_N3[:, 0]
    return np.divide(values_N3[:, 2], n - 1, out=np.full(len(n), np.nan), where=n > 1)
