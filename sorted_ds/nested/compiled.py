"""Compiles the layers of a nested model with torch.compile: the same few graphs for every layer and every sub-network.

In: a nested model. Out: the same model, whose layers run compiled. The blocks of a layer's weights are joined eagerly.
The joined weights are inputs of the graph, with a dynamic number of rows, and nothing else in the layer depends on the
width, so a layer is compiled once for all widths and depths. It is compiled again for one active head (PyTorch
specialises on a size of 1), for passes without gradients (evaluation), and for another kind of layer (qwen2's sliding
layers have a mask, its full ones have none).

A layer that cannot be compiled as a whole, or that is compiled too often, raises an error and never runs eagerly.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sorted_ds.nested.blocks import are_adjacent
from sorted_ds.nested.layers import NestedLayer, join_active, run_with
from sorted_ds.nested.nest import NestedModel

MAX_GRAPHS = 16
"""12 are needed: two kinds of layers, with one head or several, in training, evaluation, and one of fewer rows."""


def compile_layers(model: NestedModel, backend: str = "inductor") -> None:
    """Makes the layers run compiled. Call this once, before the first pass. Parameters keep their names."""
    config = torch._dynamo.config
    config.recompile_limit = max(MAX_GRAPHS, config.recompile_limit)
    compiled = torch.compile(run_with, fullgraph=True, backend=backend)

    def run(layer: NestedLayer, hidden: Tensor, args: tuple, kwargs: dict):
        if not torch.is_grad_enabled():
            hidden = hidden.detach()  # with checkpointing, the first layer's input requires a gradient even here
        joined = join_active(layer.nested, _standalone_matrix)
        for tensors in joined:
            for tensor in tensors.values():
                torch._dynamo.mark_dynamic(tensor, 0)
        return compiled(joined, layer, hidden, args, kwargs)

    for layer in model.all_layers:
        assert isinstance(layer, NestedLayer)
        layer.run = run


def _standalone_matrix(blocks: Sequence[Tensor]) -> Tensor:
    """Returns the blocks as one matrix that is neither a view nor a parameter, and has a storage offset of 0.

    The matrix uses the memory of adjacent blocks. torch.compile specialises graphs on these three properties, so with
    views into ZeRO's flat buffers the first layer would get a graph of its own.
    """
    if not are_adjacent(blocks):
        return torch.cat(list(blocks))
    first = blocks[0].detach()
    start, size = first.storage_offset() * first.element_size(), sum(block.nbytes for block in blocks)
    memory = first.untyped_storage()[start : start + size]
    rows = sum(block.shape[0] for block in blocks)
    return first.new_empty(0).set_(memory, 0, (rows, *first.shape[1:]), first.stride())
