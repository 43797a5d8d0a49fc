"""Transformer layers that run on their active weights, each as one matrix; and the list that runs some of the layers.

In: a Hugging Face layer whose linear layers are nested. Out: the same object, which first takes the active prefix of
each weight out of its blocks. One autograd function does so for all of a layer's weights: one each would cost more
Python than the products of a small sub-network (docs/log.md, "time, again"). Where blocks are no neighbours, and where
a half has them in bundles (bundles.py), a nested module is given nothing and looks for them itself.
"""

from collections.abc import Callable, Iterator, Sequence
from inspect import unwrap
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor, nn

from sorted_ds.nested.blocks import NestedModule, are_adjacent, as_one
from sorted_ds.nested.family import Half

Given = list[dict[str, Tensor]]
"""For each nested module: the active weight, and bias, as one tensor."""

_extended: dict[tuple[type[nn.Module], type[nn.Module]], type] = {}


def extended(own: type[nn.Module], front: type[nn.Module], **fields) -> type:
    """Returns a subclass of both, `front` first, made once; `fields` are its attributes.

    It keeps the name of `own`, which `save_pretrained` writes down and error messages show.
    """
    if (own, front) not in _extended:
        _extended[own, front] = type(own.__name__, (front, own), fields)
    return _extended[own, front]


class SelectedLayers(nn.ModuleList):
    """The list of a model's layers. Iteration and slices give those that run now; a number counts all of them."""

    selected: tuple[int, ...] = ()
    """The numbers of the layers that run now, ascending."""

    def select(self, layers: Sequence[int]) -> bool:
        """Runs these layers from now on, and returns whether others ran before."""
        changed = self.selected != tuple(layers)
        self.selected = tuple(layers)
        return changed

    def __iter__(self) -> Iterator[nn.Module]:
        return (self._modules[str(number)] for number in self.selected)  # type: ignore[misc]

    def __getitem__(self, which):
        return list(self)[which] if isinstance(which, slice) else super().__getitem__(which)


def number_in_cache(layers: SelectedLayers) -> None:
    """Tells each selected layer its place in the key/value cache, which has one for each layer that runs."""
    for place, layer in enumerate(layers):
        for module in layer.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = place  # type: ignore[assignment]


class NestedLayer(nn.Module):
    """What `nest_layer` adds to a Hugging Face class."""

    plain_forward: Callable
    """Hugging Face's own."""
    nested: tuple[NestedModule, ...]
    """The nested modules inside."""
    halves: tuple[Half, ...]
    run: Callable
    """`run`, `run_by_blocks`, or a compiled one (compiled.py)."""

    def forward(self, hidden: Tensor, *args, **kwargs):
        return self.run(self, hidden, args, kwargs)


def nest_layer(layer: nn.Module, halves: tuple[Half, ...]) -> None:
    """Call this when the linear layers of the halves are nested."""
    hf_class = type(layer)
    # Hugging Face wraps each class's forward, the new one's too; once is enough.
    layer.__class__ = extended(hf_class, NestedLayer, plain_forward=unwrap(hf_class.forward))
    assert isinstance(layer, NestedLayer)
    layer.nested = tuple(module for module in layer.modules() if isinstance(module, NestedModule))
    layer.halves = halves
    layer.run = run


def run(layer: NestedLayer, hidden: Tensor, args: tuple, kwargs: dict):
    """Hugging Face's forward of the layer, on the active weights as they are now."""
    return run_on(joined(layer.nested), layer, hidden, args, kwargs)


def run_by_blocks(layer: NestedLayer, hidden: Tensor, args: tuple, kwargs: dict):
    """The same, with nothing given to the nested layers, which use their blocks for as long as a product takes."""
    return layer.plain_forward(hidden, *args, **kwargs)


def run_on(given: Given, layer: NestedLayer, hidden: Tensor, args: tuple, kwargs: dict):
    """The same on given weights. torch.compile compiles this as a whole."""
    for own, weights in zip(layer.nested, given, strict=True):
        own.given = weights
    try:
        return layer.plain_forward(hidden, *args, **kwargs)
    finally:
        for own in layer.nested:
            own.given = {}


def joined(layers: Sequence[NestedModule], make: Callable[[Sequence[Tensor]], Tensor] | None = None) -> Given:
    """The active prefix of each weight, as what `make` makes of its blocks.

    Without `make` nothing is copied: one block is itself, neighbours are a view, and others are not joined.
    """
    given: Given = [{} for _ in layers]
    places, lists = [], []
    for own, layer in zip(given, layers, strict=True):
        for name in layer.names:
            blocks = layer.values(name)
            if make is None and len(blocks) == 1:
                own[name] = blocks[0]
            elif make is not None or are_adjacent(blocks):
                places.append((own, name))
                lists.append(blocks)
    if lists:
        counts = [len(blocks) for blocks in lists]
        matrices = _Join.apply(make or as_one, counts, *chain.from_iterable(lists))
        for (own, name), matrix in zip(places, matrices, strict=True):
            own[name] = matrix
    return given


class _Join(torch.autograd.Function):
    """Several lists of blocks, `counts` long, each as one matrix; each gradient is split back into views of itself."""

    @staticmethod
    def forward(ctx, make, counts: list[int], *blocks: Tensor) -> tuple[Tensor, ...]:
        lists = [blocks[start:stop] for start, stop in pairwise(accumulate(counts, initial=0))]
        ctx.rows = [[block.shape[0] for block in own] for own in lists]
        return tuple(map(make, lists))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(part for grad, rows in zip(grads, ctx.rows, strict=True) for part in grad.split(rows))
