"""Compiles the layers of a nested model with torch.compile: the same few graphs for every layer and every sub-network.

In: a nested model. Out: the same model, whose decoder layers run compiled. A compiled layer first takes its weights out
of their blocks, as one matrix each, in an eager autograd function in the layer's own place in the pass. These matrices
are the graph's inputs, their rows are a dynamic size, and nothing else in the layer depends on the width: a layer is
compiled once for all widths and depths. Once more where one head is drawn (PyTorch treats a size of 1 apart), without
gradients (evaluation), and for another kind of layer (qwen2's sliding ones have a mask, the full ones have none).

A layer that cannot be compiled as a whole, or that is compiled too often, is an error: never eager in silence.
"""

from collections.abc import Sequence
from functools import cache
from inspect import unwrap
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from sorted_ds.nested.layers import NestedLayer, are_adjacent
from sorted_ds.nested.nest import NestedModel

MOST_GRAPHS = 16
"""Two kinds of layer x one head or several x training, evaluation, and evaluation of fewer rows: 12."""


def compile_layers(model: NestedModel, backend: str = "inductor") -> None:
    """Call once, before the first pass. Parameters and their names stay as they are."""
    config = torch._dynamo.config
    config.recompile_limit = max(MOST_GRAPHS, config.recompile_limit)
    run = torch.compile(_run, fullgraph=True, backend=backend)
    for layer in model.model.layers:
        layer.run = run
        layer.nested = tuple(module for module in layer.modules() if isinstance(module, NestedLayer))
        layer.__class__ = _compiled_class(layer.__class__)


@cache
def _compiled_class(hf_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass: Hugging Face wraps the forward of each class in its checkpointing, which stays out of the graph."""
    plain_forward = unwrap(hf_class.forward)

    def forward(self, hidden: Tensor, *args, **kwargs):
        if not torch.is_grad_enabled():
            hidden = hidden.detach()  # with checkpointing the first layer's requires a gradient even here
        return self.run(plain_forward, self, self.nested, _drawn_weights(self.nested), hidden, args, kwargs)

    return type(hf_class.__name__, (hf_class,), {"forward": forward})


def _run(forward, layer: nn.Module, nested: tuple[NestedLayer, ...], given: list[dict[str, Tensor]], *inputs):
    """What is compiled: Hugging Face's forward of the layer, its nested layers on the given weights."""
    hidden, args, kwargs = inputs
    for own, weights in zip(nested, given, strict=True):
        own.given = weights
    try:
        return forward(layer, hidden, *args, **kwargs)
    finally:
        for own in nested:
            own.given = None


def _drawn_weights(layers: Sequence[NestedLayer]) -> list[dict[str, Tensor]]:
    """The drawn weight, and bias, of each layer."""
    keys = [(number, name) for number, layer in enumerate(layers) for name in layer.names]
    blocks = [layers[number].values(name) for number, name in keys]
    joined = _JoinEach.apply([len(one) for one in blocks], *(block for one in blocks for block in one))
    given: list[dict[str, Tensor]] = [{} for _ in layers]
    for (number, name), tensor in zip(keys, joined, strict=True):
        torch._dynamo.mark_dynamic(tensor, 0)
        given[number][name] = tensor
    return given


class _JoinEach(torch.autograd.Function):
    """Several lists of blocks, `counts` long, each as one matrix; each gradient is split back into views of itself.

    Without a copy where the blocks are neighbours.
    """

    @staticmethod
    def forward(ctx, counts: list[int], *blocks: Tensor) -> tuple[Tensor, ...]:
        lists = [blocks[start:stop] for start, stop in pairwise(accumulate(counts, initial=0))]
        ctx.rows = [[len(block) for block in own] for own in lists]
        return tuple(_standing_alone(own) if are_adjacent(own) else torch.cat(own) for own in lists)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(part for grad, rows in zip(grads, ctx.rows, strict=True) for part in grad.split(rows))


def _standing_alone(blocks: Sequence[Tensor]) -> Tensor:
    """Neighbouring blocks as one matrix that shares their memory, but is no view, no parameter, and starts at offset 0.

    Graphs are specialised on these, and ZeRO's flat buffers would compile the first layer apart from the others.
    """
    first = blocks[0].detach()
    start, size = first.storage_offset() * first.element_size(), sum(block.nbytes for block in blocks)
    memory = first.untyped_storage()[start : start + size]
    rows = sum(block.shape[0] for block in blocks)
    return first.new_empty(0).set_(memory, 0, (rows, *first.shape[1:]), first.stride())
