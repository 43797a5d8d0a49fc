"""Predicts what grows with the sizes of a sub-network, such as its times, from sub-networks where it was measured.

In: measured values by sub-network. Out: a function of a sub-network, and its error on sub-networks that it did not see.
The model is linear in what the cost is made of: a constant, the layers, and the layers times each width.
"""

from collections.abc import Callable, Mapping

import numpy as np

from sorted_ds.space import SubNet
from sorted_ds.space.axes import DEPTH

Prediction = Callable[[SubNet], float]


def fit(values: Mapping[SubNet, float]) -> Prediction:
    """Returns the prediction with the smallest squared relative errors on positive values.

    No part of the cost is negative. One to which noise gives a negative share is left out.
    """
    scaled = np.array([_terms(subnet) for subnet in values]) / np.array(list(values.values()))[:, None]
    parts = list(range(scaled.shape[1]))
    while True:
        shares, *_ = np.linalg.lstsq(scaled[:, parts], np.ones(len(scaled)), rcond=None)
        if shares.min() >= 0:
            return lambda subnet: float(np.dot(shares, np.array(_terms(subnet))[parts]))
        del parts[int(shares.argmin())]


def errors(values: Mapping[SubNet, float]) -> list[float]:
    """Returns the relative error of each value when it is predicted from all others. Needs `num_needed` values."""
    return [abs(fit(_without(values, subnet))(subnet) / value - 1) for subnet, value in values.items()]


def num_needed(subnet: SubNet) -> int:
    """Returns the smallest number of values whose prediction has an error that can be told."""
    return len(_terms(subnet)) + 1


def _without(values: Mapping[SubNet, float], left_out: SubNet) -> dict[SubNet, float]:
    return {subnet: value for subnet, value in values.items() if subnet != left_out}


def _terms(subnet: SubNet) -> list[float]:
    widths = [size for letter, size in subnet.sizes if letter != DEPTH]
    return [1.0, subnet.depth, *(subnet.depth * size for size in widths)]
