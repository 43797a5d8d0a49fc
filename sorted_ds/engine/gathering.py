"""Under ZeRO-3, what a nested layer gathers when it is called: the blocks that are drawn, and no others.

DeepSpeed gathers the parameters that a called module owns and those that it lists as *external*: owned elsewhere, used
here. Blocks are modules of their own that are never called, and each nested layer's list is the drawn ones of its
blocks. So a layer costs one fetch and one release, as a plain linear layer does, whatever its number of width steps.
Source: DeepSpeed 0.19.8, runtime/zero/partition_parameters.py (`_init_external_params`, which keeps a list that is
there), runtime/zero/partitioned_param_coordinator.py (`iter_params`).
"""

from collections.abc import Callable, ItemsView
from itertools import accumulate

from torch import nn

from sorted_ds.nested import NestedModel
from sorted_ds.nested.layers import NestedLayer


def gather_drawn_blocks(model: NestedModel) -> None:
    """Call before `deepspeed.initialize`."""
    for layer in model.modules():
        if isinstance(layer, NestedLayer):
            layer._external_params = {}  # type: ignore[assignment]
            layer.ds_external_parameters = _drawn_of(layer)  # type: ignore[assignment]


def _drawn_of(layer: NestedLayer) -> Callable[[], ItemsView[str, nn.Parameter]]:
    """DeepSpeed asks several times for each call of a layer, so the answers are made once."""
    own = [{f"blocks.{n}.{k}": p for k, p in b.named_parameters()} for n, b in enumerate(layer.blocks)]
    prefixes = list(accumulate(own, lambda before, more: before | more))
    return lambda: prefixes[layer.width.num_steps - 1].items()
