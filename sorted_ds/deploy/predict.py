"""Predicts what follows from the sizes of a sub-network, such as its times, from sub-networks where it was measured.

In: measured values by sub-network. Out: a function of a sub-network, and its error on sub-networks that it did not see.
The model is linear in what a cost or a loss is made of.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sorted_ds.deploy.speed import Speed
from sorted_ds.space import SubNet
from sorted_ds.space.axes import DEPTH

PREDICTED_TIMES = ("prefill_ms", "decode_ms")
PREDICTED = (*PREDICTED_TIMES, "memory_bytes", "cache_bytes")
"""The fields of a `Speed` that are predicted."""
Prediction = Callable[[SubNet], float]
Terms = Callable[[SubNet], list[float]]
"""Returns the parts of which a prediction is the weighted sum."""


def cost_terms(subnet: SubNet) -> list[float]:
    """Returns what a cost is made of: 1, the layers, and the layers times each width."""
    widths = [size for letter, size in subnet.sizes if letter != DEPTH]
    return [1.0, subnet.depth, *(subnet.depth * size for size in widths)]


def inverse_sizes(subnet: SubNet) -> list[float]:
    """Returns what a loss is made of: 1, and one over each size."""
    return [1.0, *(1 / size for _, size in subnet.sizes)]


def fit(values: Mapping[SubNet, float], terms: Terms = cost_terms) -> Prediction:
    """Returns the prediction with the smallest squared relative errors on positive values.

    No part of it is negative. One to which noise gives a negative share is left out.
    """
    scaled = np.array([terms(subnet) for subnet in values]) / np.array(list(values.values()))[:, None]
    parts = list(range(scaled.shape[1]))
    while True:
        shares, *_ = np.linalg.lstsq(scaled[:, parts], np.ones(len(scaled)), rcond=None)
        if shares.min() >= 0:
            return lambda subnet: float(np.dot(shares, np.array(terms(subnet))[parts]))
        del parts[int(shares.argmin())]


def errors(values: Mapping[SubNet, float]) -> list[float]:
    """Returns the relative error of each value when it is predicted from all others. Needs `num_needed` values."""
    return [abs(fit(_without(values, subnet))(subnet) / value - 1) for subnet, value in values.items()]


def num_needed(subnet: SubNet) -> int:
    """Returns the smallest number of values whose prediction has an error that can be told."""
    return len(cost_terms(subnet)) + 1


def _without(values: Mapping[SubNet, float], left_out: SubNet) -> dict[SubNet, float]:
    return {subnet: value for subnet, value in values.items() if subnet != left_out}


def predict_speeds(measured: Mapping[SubNet, Speed], subnets: Sequence[SubNet]) -> dict[SubNet, Speed]:
    """Returns the speeds of those sub-networks that were not measured, from those that were, for one setting.

    Nothing is predicted from too few to tell the error.
    """
    rest = [subnet for subnet in subnets if subnet not in measured]
    if not rest or len(measured) < num_needed(rest[0]):
        return {}
    setting = next(iter(measured.values())).setting
    columns = {name: {subnet: getattr(speed, name) for subnet, speed in measured.items()} for name in PREDICTED}
    predictions = {name: fit(column) for name, column in columns.items()}
    off = [error for name in PREDICTED_TIMES for error in errors(columns[name])]
    return {
        subnet: Speed(
            batch=setting.batch,
            context=setting.context,
            prefill_ms=predictions["prefill_ms"](subnet),
            prefill_spread_ms=None,
            decode_ms=predictions["decode_ms"](subnet),
            decode_spread_ms=None,
            memory_bytes=round(predictions["memory_bytes"](subnet)),
            cache_bytes=round(predictions["cache_bytes"](subnet)),
            median_error=statistics.median(off),
            largest_error=max(off),
        )
        for subnet in rest
    }
