"""Compiles the layers of a nested model with torch.compile: the same few graphs for every layer and every sub-network.

In: a nested model. Out: the same model, whose decoder layers run compiled. The weights that a layer takes out of its
blocks, eagerly, are the graph's inputs, their rows are a dynamic size, and nothing else in the layer depends on the
width: a layer is compiled once for all widths and depths. It is compiled once more where one head is active (PyTorch
treats a size of 1 apart), without gradients (evaluation), and for another kind of layer (qwen2's sliding ones have a
mask, the full ones have none).

A layer that cannot be compiled as a whole, or that is compiled too often, is an error: never eager in silence.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sorted_ds.nested.blocks import are_adjacent
from sorted_ds.nested.layers import NestedLayer, joined, run_on
from sorted_ds.nested.nest import NestedModel

MOST_GRAPHS = 16
"""Two kinds of layer x one head or several x training, evaluation, and evaluation of fewer rows: 12."""


def compile_layers(model: NestedModel, backend: str = "inductor") -> None:
    """Call once, before the first pass. Parameters and their names stay as they are."""
    config = torch._dynamo.config
    config.recompile_limit = max(MOST_GRAPHS, config.recompile_limit)
    compiled = torch.compile(run_on, fullgraph=True, backend=backend)

    def run(layer: NestedLayer, hidden: Tensor, args: tuple, kwargs: dict):
        if not torch.is_grad_enabled():
            hidden = hidden.detach()  # with checkpointing the first layer's requires a gradient even here
        given = joined(layer.nested, _standing_alone)
        for weights in given:
            for tensor in weights.values():
                torch._dynamo.mark_dynamic(tensor, 0)
        return compiled(given, layer, hidden, args, kwargs)

    for layer in model.all_layers:
        assert isinstance(layer, NestedLayer)
        layer.run = run


def _standing_alone(blocks: Sequence[Tensor]) -> Tensor:
    """As one matrix that is no view, no parameter, and starts at offset 0. It shares the memory of neighbouring blocks.

    Graphs are specialised on these, and ZeRO's flat buffers would compile the first layer apart from the others.
    """
    if not are_adjacent(blocks):
        return torch.cat(list(blocks))
    first = blocks[0].detach()
    start, size = first.storage_offset() * first.element_size(), sum(block.nbytes for block in blocks)
    memory = first.untyped_storage()[start : start + size]
    rows = sum(block.shape[0] for block in blocks)
    return first.new_empty(0).set_(memory, 0, (rows, *first.shape[1:]), first.stride())
