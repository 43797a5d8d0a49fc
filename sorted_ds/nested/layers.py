"""Transformer layers that run on their active weights, the list that runs some of them, and the final norm.

In: a Hugging Face layer whose linear layers are nested. Out: the same object, which first joins the active blocks of
each weight into one matrix. One autograd function does this for all weights of a layer, because one for each weight
would cost more Python time than the products of a small sub-network (docs/log.md, "time, again"). If blocks are not
adjacent, or lie in bundles (bundles.py), nothing is joined here and each nested module looks its weight up itself.
"""

from collections.abc import Callable, Iterator, Sequence
from inspect import unwrap
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor, nn

from sorted_ds.nested.blocks import NestedModule, are_adjacent, joined_view
from sorted_ds.nested.exits import Exits
from sorted_ds.nested.family import Half

Joined = list[dict[str, Tensor]]
"""The active weight and bias of each nested module, each as one tensor."""

_subclasses: dict[tuple[type[nn.Module], type[nn.Module]], type] = {}


def subclass_of(hf_class: type[nn.Module], extension: type[nn.Module], /, **fields) -> type:
    """Returns the subclass of both, with `extension` first and `fields` as attributes. Each subclass is made once.

    The subclass has the name of `hf_class`, because `save_pretrained` writes the name and error messages show it.
    """
    if (hf_class, extension) not in _subclasses:
        _subclasses[hf_class, extension] = type(hf_class.__name__, (extension, hf_class), fields)
    return _subclasses[hf_class, extension]


class SelectedLayers(nn.ModuleList):
    """The list of a model's layers. Iteration and slices give the selected layers; an index counts all layers."""

    selected: tuple[int, ...] = ()
    """The numbers of the layers that run, ascending."""

    def select(self, layers: Sequence[int]) -> bool:
        """Selects the layers that run from now on, and returns whether the selection changed."""
        changed = self.selected != tuple(layers)
        self.selected = tuple(layers)
        return changed

    def __iter__(self) -> Iterator[nn.Module]:
        return (self._modules[str(number)] for number in self.selected)  # type: ignore[misc]

    def __getitem__(self, which):
        return list(self)[which] if isinstance(which, slice) else super().__getitem__(which)


def set_cache_indices(layers: SelectedLayers) -> None:
    """Sets the index of each selected layer in the key/value cache, which has one entry for each selected layer."""
    for position, layer in enumerate(layers):
        for module in layer.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = position  # type: ignore[assignment]


class NestedLayer(nn.Module):
    """A Hugging Face layer class, extended by `nest_layer`."""

    plain_forward: Callable
    """Hugging Face's forward."""
    nested: tuple[NestedModule, ...]
    """The nested modules in the layer."""
    halves: tuple[Half, ...]
    number: int
    """The number of the layer in the full network."""
    exits: Exits
    run: Callable
    """How the layer runs: `run_joined`, `run_by_blocks`, or a compiled function (compiled.py)."""

    def forward(self, hidden: Tensor, *args, **kwargs):
        output = self.run(self, hidden, args, kwargs)
        self.exits.keep(self.number, output)
        return output


def nest_layer(layer: nn.Module, halves: tuple[Half, ...], number: int, exits: Exits) -> None:
    """Makes a layer run on its active weights, in place. The linear layers of the halves must be nested already."""
    hf_class = type(layer)
    # Hugging Face wraps the forward of each class, also of the new one, so its own wrapper is removed here.
    layer.__class__ = subclass_of(hf_class, NestedLayer, plain_forward=unwrap(hf_class.forward))
    assert isinstance(layer, NestedLayer)
    layer.nested = tuple(module for module in layer.modules() if isinstance(module, NestedModule))
    layer.halves, layer.number, layer.exits = halves, number, exits
    layer.run = run_joined


class FinalNorm(nn.Module):
    """The class of a model's final norm, extended by `attach_exits`."""

    plain_forward: Callable
    exits: Exits

    def forward(self, hidden: Tensor) -> Tensor:
        return self.plain_forward(self.exits.joined(hidden))


def attach_exits(norm: nn.Module, exits: Exits) -> None:
    """Makes the final norm run on the states of all exits, in place."""
    hf_class = type(norm)
    norm.__class__ = subclass_of(hf_class, FinalNorm, plain_forward=hf_class.forward)
    norm.exits = exits  # type: ignore[assignment]


def run_joined(layer: NestedLayer, hidden: Tensor, args: tuple, kwargs: dict):
    """Runs Hugging Face's forward of the layer on the active weights, each joined into one matrix if possible."""
    return run_with(join_active(layer.nested), layer, hidden, args, kwargs)


def run_by_blocks(layer: NestedLayer, hidden: Tensor, args: tuple, kwargs: dict):
    """Runs Hugging Face's forward of the layer; each nested module joins its blocks for the time of a product."""
    return layer.plain_forward(hidden, *args, **kwargs)


def run_with(joined: Joined, layer: NestedLayer, hidden: Tensor, args: tuple, kwargs: dict):
    """Runs Hugging Face's forward of the layer on joined weights. torch.compile compiles this function as a whole."""
    for module, tensors in zip(layer.nested, joined, strict=True):
        module.joined = tensors
    try:
        return layer.plain_forward(hidden, *args, **kwargs)
    finally:
        for module in layer.nested:
            module.joined = {}


def join_active(modules: Sequence[NestedModule], join: Callable[[Sequence[Tensor]], Tensor] | None = None) -> Joined:
    """Returns the active part of each module's parameters, with the blocks of a parameter joined by `join`.

    Without `join` nothing is copied: a single block is returned itself, adjacent blocks as a view, and a parameter
    whose blocks are not adjacent is left out.
    """
    joined: Joined = [{} for _ in modules]
    targets, lists = [], []
    for tensors, module in zip(joined, modules, strict=True):
        for name in module.parameter_names:
            blocks = module.active_blocks(name)
            if join is None and len(blocks) == 1:
                tensors[name] = blocks[0]
            elif join is not None or are_adjacent(blocks):
                targets.append((tensors, name))
                lists.append(blocks)
    if lists:
        counts = [len(blocks) for blocks in lists]
        matrices = _Join.apply(join or joined_view, counts, *chain.from_iterable(lists))
        for (tensors, name), matrix in zip(targets, matrices, strict=True):
            tensors[name] = matrix
    return joined


class _Join(torch.autograd.Function):
    """Joins several lists of blocks, of lengths `counts`, into one matrix each.

    The gradient of a block is a view of the matrix's gradient.
    """

    @staticmethod
    def forward(ctx, join, counts: list[int], *blocks: Tensor) -> tuple[Tensor, ...]:
        lists = [blocks[start:stop] for start, stop in pairwise(accumulate(counts, initial=0))]
        ctx.rows = [[block.shape[0] for block in joined] for joined in lists]
        return tuple(map(join, lists))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(part for grad, rows in zip(grads, ctx.rows, strict=True) for part in grad.split(rows))
