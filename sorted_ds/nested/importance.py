"""Finds out which attention groups, channels and layers of a trained network matter, and puts the important ones first.

In: a plain Hugging Face model of a family, and its loss on some text. Out: the importance of each unit, the same model
with its units sorted, and a layer order. The full network computes the same as before, because the units of a half are
summed, and a sum has no order. A sub-network takes the first units, so it takes the important ones.

Importance of a unit: the mean square of what it adds to the residual stream, over calibration tokens. For a
feed-forward channel that is the mean square of its activation times the squared norm of its column.
Sources: Wanda, arXiv 2306.11695 (weights times activations); Minitron, arXiv 2407.14679 (activations of heads and
channels; layers by the loss without them).

Legend: U = units of a half (groups or channels), r = features of a unit on the input side, H = hidden channels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sorted_ds.nested.family import Family, Half, Part, layers_of
from sorted_ds.nested.layers import NestedLayer

Importance = dict[tuple[int, str], Tensor]
"""The importance of each unit, [U], by the number of the layer and the letter of the axis."""


@contextmanager
def watched(model: PreTrainedModel, family: Family) -> Iterator[Importance]:
    """Sums the squares of what each unit adds, over all tokens of the forward passes inside."""
    found: Importance = {}
    moments: dict[tuple[int, str], Tensor] = {}
    handles = []
    for number, layer in enumerate(layers_of(model, family)):
        for half in family.halves(model.config):
            part = _input_side(half)
            module = _module(layer, half, part)
            handles.append(module.register_forward_pre_hook(_adds_moments(moments, (number, half.axis), part.rows)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for number, layer in enumerate(layers_of(model, family)):
        for half in family.halves(model.config):
            weight = _module(layer, half, _input_side(half)).weight
            found[number, half.axis] = _added_squares(weight, moments[number, half.axis])


def _input_side(half: Half) -> Part:
    """Returns the projection that sums what the units of a half add."""
    return next(part for part in half.parts if part.side == "input")


def _module(layer: nn.Module, half: Half, part: Part) -> Any:
    return layer.get_submodule(half.path).get_submodule(part.path)


def _adds_moments(moments: dict[tuple[int, str], Tensor], key: tuple[int, str], rows: int) -> Callable:
    """Returns a hook that adds the second moments of each unit's features. Shape [U, r, r]."""

    def add(module: nn.Module, args: tuple) -> None:
        units = args[0].detach().float().flatten(0, -2).unflatten(-1, (-1, rows))
        own = torch.einsum("nur,nus->urs", units, units)
        moments[key] = moments[key] + own if key in moments else own

    return add


def _added_squares(weight: Tensor, moments: Tensor) -> Tensor:
    """Returns the summed squares of weight @ features, for each unit. Shapes: [H, U * r], [U, r, r] -> [U]."""
    by_unit = weight.detach().float().unflatten(1, moments.shape[:2])
    return torch.einsum("hur,urs,hus->u", by_unit, moments, by_unit)


@torch.no_grad()
def sort_units(model: PreTrainedModel, family: Family, importance: Importance) -> None:
    """Sorts the units of every half by importance, in place. What the model computes does not change."""
    for number, layer in enumerate(layers_of(model, family)):
        for half in family.halves(model.config):
            order = importance[number, half.axis].argsort(descending=True, stable=True)
            for part in half.parts:
                module = _module(layer, half, part)
                features = (order.unsqueeze(1) * part.rows + torch.arange(part.rows, device=order.device)).flatten()
                if part.side == "input":
                    module.weight.copy_(module.weight[:, features])
                    continue
                module.weight.copy_(module.weight[features])
                if getattr(module, "bias", None) is not None:
                    module.bias.copy_(module.bias[features])


@contextmanager
def entering(model: PreTrainedModel, family: Family) -> Iterator[dict[int, Tensor]]:
    """Keeps the hidden states that enter each layer in the forward passes inside, by the number of the layer."""
    states: dict[int, Tensor] = {}

    def keeps(number: int) -> Callable:
        def keep(module: nn.Module, args: tuple) -> None:
            states[number] = args[0]

        return keep

    handles = [layer.register_forward_pre_hook(keeps(number)) for number, layer in enumerate(layers_of(model, family))]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def giving(layer: NestedLayer, states: Tensor) -> Iterator[None]:
    """Makes a layer give these hidden states, whatever enters it."""
    run, layer.run = layer.run, lambda *_: states
    try:
        yield
    finally:
        layer.run = run


def layer_order(
    num_layers: int,
    fewest: int,
    losses_without: Callable[[tuple[int, ...]], Iterable[tuple[int, float]]],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[tuple[int, ...], dict[int, float]]:
    """Returns an order of the layers, and the loss at each smaller number of layers that was measured.

    One layer after the other is left out: the one without which the loss is lowest, together with those before it. So
    depth n of the order has the layers that are left. It stops at `fewest` layers, which come first in the order, in
    the network's own sequence. `losses_without(layers)` yields each other layer, and the loss without these layers and
    it.
    """
    left_out: list[int] = []
    losses: dict[int, float] = {}
    total = sum(range(fewest + 1, num_layers + 1))
    for left in range(num_layers, fewest, -1):
        found = []
        for layer, loss in losses_without(tuple(sorted(left_out))):
            found.append((loss, layer))
            report(sum(range(left + 1, num_layers + 1)) + len(found), total)
        losses[left - 1], layer = min(found)
        left_out.append(layer)
    kept = [layer for layer in range(num_layers) if layer not in left_out]
    return (*kept, *reversed(left_out)), losses


def by_layer(importance: Importance, axis: str) -> Mapping[int, Sequence[float]]:
    """Returns the share of each unit in the importance of its half, by layer, the most important one first."""
    found = {}
    for (number, letter), values in importance.items():
        if letter == axis:
            shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
            found[number] = shares.sort(descending=True).values.tolist()
    return found
