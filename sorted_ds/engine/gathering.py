"""Under ZeRO-3, what a nested layer gathers when it is called: the blocks that are drawn, side by side, and no others.

DeepSpeed gathers the parameters that a called module owns and those that it lists as *external*: owned elsewhere, used
here. Blocks are modules of their own that are never called, and each nested layer's list is the drawn ones of its
blocks. So a layer costs one fetch and one release, as a plain linear layer does, whatever its number of width steps.
What was gathered is copied once out of the buffer that all ranks' shares arrive in. DeepSpeed gives each parameter
memory of its own there; here the blocks of a weight share theirs, so that they are one matrix without a further copy.
(Not those of a weight so small that its first blocks stay gathered, nor of one that a prefetch has cut.)
Source: DeepSpeed 0.19.8, runtime/zero/partition_parameters.py (`_init_external_params`, which keeps a list that is
there; `AllGatherCoalescedHandle.wait`), runtime/zero/partitioned_param_coordinator.py (`iter_params`).
"""

from collections import defaultdict
from collections.abc import Callable, ItemsView
from itertools import accumulate

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus
from torch import Tensor, nn

from sorted_ds.nested import NestedModel
from sorted_ds.nested.layers import NestedLayer

WEIGHT_KEY = "sorted_ds_weight"
"""Attribute of a block's parameter: which layer's weight, or bias, it is a part of."""


def gather_drawn_blocks(model: NestedModel) -> None:
    """Call before `deepspeed.initialize`."""
    for layer in model.modules():
        if isinstance(layer, NestedLayer):
            layer._external_params = {}  # type: ignore[assignment]
            layer.ds_external_parameters = _drawn_of(layer)  # type: ignore[assignment]


def persist_as_extracted(model: NestedModel, optimizer) -> None:
    """Keeps a block gathered between passes where the extracted model that ends with it would keep its weight.

    That is, where all blocks up to it are together not above `stage3_param_persistence_threshold`. DeepSpeed looks at
    each alone, so a space with many widths would keep whole layers of small blocks on every rank. Call after
    `deepspeed.initialize`, before the first pass. Source: DeepSpeed 0.19.8, runtime/zero/parameter_offload.py
    (`mark_persistent_parameters`).
    """
    threshold = optimizer.parameter_offload.param_numel_persistence_threshold
    for layer in model.modules():
        if isinstance(layer, NestedLayer):
            for name in layer.names:
                blocks = [getattr(block, name) for block in layer.blocks]
                for block, size in zip(blocks, accumulate(block.ds_numel for block in blocks), strict=True):
                    block.ds_persist &= size <= threshold
    persistent = optimizer.persistent_parameters
    persistent[:] = [parameter for parameter in persistent if parameter.ds_persist]


def _drawn_of(layer: NestedLayer) -> Callable[[], ItemsView[str, nn.Parameter]]:
    """DeepSpeed asks several times for each call of a layer, so the answers are made once."""
    own = [{f"blocks.{n}.{k}": p for k, p in b.named_parameters()} for n, b in enumerate(layer.blocks)]
    prefixes = list(accumulate(own, lambda before, more: before | more))
    return lambda: prefixes[layer.width.num_steps - 1].items()


def gather_side_by_side(model: NestedModel, optimizer) -> None:
    """Call after `deepspeed.initialize`, before the first pass.

    The parameters that stay, which DeepSpeed gathers after each step with a call for each, take one call.
    """
    for layer in model.modules():
        if isinstance(layer, NestedLayer):
            for block in layer.blocks:
                for name, parameter in block.named_parameters():
                    setattr(parameter, WEIGHT_KEY, (id(layer), name))
    for parameter in model.parameters():
        parameter.all_gather_coalesced = _adopting(parameter.all_gather_coalesced)  # type: ignore[attr-defined]
    for parameter in optimizer.persistent_parameters[:1]:
        parameter.all_gather = _gather_in_one_call


def _gather_in_one_call(param_list: list) -> None:
    absent = [parameter for parameter in param_list if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    if absent:
        absent[0].all_gather_coalesced(absent).wait()


def _adopting(gather: Callable) -> Callable:
    def all_gather_coalesced(*args, **kwargs):
        handle = gather(*args, **kwargs)
        for one in getattr(handle, "handles", ()):  # on one rank there is nothing to gather, and there are none
            if type(one) is AllGatherCoalescedHandle:
                one.__class__ = _SideBySide
        return handle

    return all_gather_coalesced


class _SideBySide(AllGatherCoalescedHandle):
    """Parameters that are being gathered in one call."""

    complete: bool

    @torch.no_grad()
    def wait(self, handle_dependency: bool = True) -> None:
        if self.complete:
            return
        self.allgather_handle.wait()
        start = 0
        for parameter, room in zip(self.params, self._rooms(), strict=True):
            size, share = parameter.ds_numel, parameter.ds_tensor.ds_numel  # the last ranks' shares may be padded
            owners = [(flat, share * rank) for rank, flat in enumerate(self.partitions) if share * rank < size]
            parts = [flat.narrow(0, start, min(share, size - before)) for flat, before in owners]
            parameter.data = torch.cat(parts, out=room).view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE
            if not get_accelerator().is_synchronized_device():
                for part in parts:
                    part.record_stream(get_accelerator().current_stream())
            start += share
        self.complete = True

    def _rooms(self) -> list[Tensor]:
        """Memory for each parameter. Blocks of one weight, which follow each other here, get neighbouring memory."""
        weights: dict[tuple[int, str], list] = defaultdict(list)
        for parameter in self.params:
            weights[getattr(parameter, WEIGHT_KEY, (id(parameter), ""))].append(parameter)
        rooms: dict[int, Tensor] = {}
        for blocks in weights.values():
            sizes = [block.ds_numel for block in blocks]
            memory = self.partitions[0].new_empty(sum(sizes))
            rooms.update({id(block): room for block, room in zip(blocks, memory.split(sizes), strict=True)})
        return [rooms[id(parameter)] for parameter in self.params]
