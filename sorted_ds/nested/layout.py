"""Makes the blocks of each nested layer adjacent in memory, so that a prefix of them is one matrix without a copy.

In: a nested model. Out: the same model. ZeRO stages 1 and 2 make blocks adjacent themselves, when they flatten
parameters in order. Stage 0 does not, and a model that was moved or cast has separate blocks, too.
"""

import torch
from torch import nn

from sorted_ds.nested.blocks import NestedModule, are_adjacent


def lay_out(model: nn.Module) -> None:
    """Moves the blocks of each nested layer into one buffer. The Parameter objects stay the same."""
    with torch.no_grad():
        for parameters in _block_lists(model):
            if not are_adjacent(parameters):
                buffer = torch.cat([p.detach() for p in parameters])
                for parameter, view in zip(parameters, buffer.split([len(p) for p in parameters]), strict=True):
                    parameter.data = view


def is_laid_out(model: nn.Module) -> bool:
    """Returns whether every nested layer can use its blocks as one matrix without a copy."""
    return all(are_adjacent(parameters) for parameters in _block_lists(model))


def _block_lists(model: nn.Module) -> list[list[nn.Parameter]]:
    """Returns one list for the weights, and one for the biases, of the blocks of each nested layer."""
    layers = [layer for layer in model.modules() if isinstance(layer, NestedModule)]
    lists = [[getattr(block, kind) for block in layer.blocks] for layer in layers for kind in ("weight", "bias")]
    return [parameters for parameters in lists if parameters and parameters[0] is not None]
