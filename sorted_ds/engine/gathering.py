"""Under ZeRO-3, makes each layer half gather its active bundles, and no others, into shared memory.

In: a nested model with bundles, and DeepSpeed's stage 3 optimizer. Out: the same objects, with changed gathering.
DeepSpeed gathers the parameters that a called module owns, and the *external* parameters that it lists: they belong to
other modules but are used by this one. Bundles and blocks are modules that are never called, and a half lists the
active ones as external. So a half costs one fetch and one release, of one parameter for each active width step.

DeepSpeed copies gathered parameters once, from the buffer that receives all ranks' shares to memory of each parameter.
Here the active bundles of a half share that memory, with the blocks of each weight adjacent, so that each weight is one
matrix without a further copy, even if DeepSpeed's prefetch gathers the half in several calls. There are two exceptions:
bundles that are persistent have memory of their own, and on one rank nothing is gathered.
Source: DeepSpeed 0.19.8, runtime/zero/partition_parameters.py (`_init_external_params`, which keeps an existing list;
`AllGatherCoalescedHandle.wait`), runtime/zero/partitioned_param_coordinator.py (`iter_params`).
"""

import operator
from collections.abc import Callable, ItemsView, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus
from torch import Tensor, nn

from sorted_ds.nested import NestedModel
from sorted_ds.nested.blocks import NestedModule, Width
from sorted_ds.nested.bundles import BundledHalf
from sorted_ds.nested.owned import OwnedModule

BUNDLE = "sorted_ds_bundle"
"""The attribute of a bundle's parameter that holds the half and the number of the width step."""

MAX_CACHED = 4096
"""The number of cached results of `copy_ranges`. Each bundle needs one for each number of active width steps."""


def gather_active(model: NestedModel) -> None:
    """Makes nested modules list their active parameters as external. Call this before `deepspeed.initialize`."""
    for module in model.modules():
        if isinstance(module, BundledHalf):
            _list_active(module, module.width, _parameters_by_step(module))
        elif isinstance(module, NestedModule) and "weight" in module.parameter_names:  # a norm
            _list_active(module, module.width, [dict(block.named_parameters()) for block in module.blocks])
        elif isinstance(module, OwnedModule):
            _list_owned_copy(module)


def _list_active(module: nn.Module, width: Width, by_step: Sequence[dict[str, nn.Parameter]]) -> None:
    """Makes `module` list the active ones of `by_step`, the parameters that each width step adds, as external."""
    named = [{f"{step}.{name}": p for name, p in added.items()} for step, added in enumerate(by_step)]
    prefixes = list(accumulate(named, operator.or_))  # DeepSpeed asks several times a call, so the lists are made once

    def active() -> ItemsView[str, nn.Parameter]:
        return prefixes[width.num_steps - 1].items()

    module._external_params = {}  # type: ignore[assignment]
    module.ds_external_parameters = active  # type: ignore[assignment]


def _list_owned_copy(module: OwnedModule) -> None:
    """Makes `module` list the parameters of the active copies as external."""
    copies = {
        owner: [(f"{owner}.{name}", parameter) for name, parameter in copy.named_parameters()]
        for owner, copy in module.copies.items()
    }

    def active() -> ItemsView[str, nn.Parameter]:
        return dict(chain.from_iterable(copies[owner] for owner in module.active)).items()

    module._external_params = {}  # type: ignore[assignment]
    module.ds_external_parameters = active  # type: ignore[assignment]


def _parameters_by_step(half: BundledHalf) -> list[dict[str, nn.Parameter]]:
    """Returns the bundle and biases that each width step adds. The first step has the biases that are not nested."""
    by_step: list[dict[str, nn.Parameter]] = [dict(bundle.named_parameters()) for bundle in half.all_bundles()]
    for name, layer in zip(half.linear_names, half.linears, strict=True):
        for added, block in zip(by_step, layer.blocks, strict=False):  # a layer without biases has no blocks
            added |= {f"{name}.{kind}": parameter for kind, parameter in block.named_parameters()}
        by_step[0] |= {f"{name}.{kind}": p for kind, p in layer.named_parameters(recurse=False)}
    return by_step


def persist_as_extracted(model: NestedModel, optimizer) -> None:
    """Marks a parameter as persistent if DeepSpeed would keep it gathered in an extracted model that ends with it.

    In the extracted model, each weight consists of the block in this parameter and all blocks before it. All weights of
    the parameter must be at most `stage3_param_persistence_threshold` large. So a bundle is not persistent if only its
    small key and value weights would be. DeepSpeed itself checks the size of the parameter alone, so in a space with
    many widths it would keep whole layers on every rank. Call this after `deepspeed.initialize`, before the first pass.
    Source: DeepSpeed 0.19.8, runtime/zero/parameter_offload.py (`mark_persistent_parameters`).
    """
    threshold = optimizer.parameter_offload.param_numel_persistence_threshold
    largest = dict(_largest_weights(model))
    for parameter in model.parameters():
        size = largest.get(id(parameter), parameter.ds_numel)  # type: ignore[attr-defined]
        parameter.ds_persist = size <= threshold  # type: ignore[attr-defined]
    optimizer.persistent_parameters[:] = [p for p in model.parameters() if p.ds_persist]  # type: ignore[attr-defined]


def _largest_weights(model: NestedModel) -> Iterator[tuple[int, int]]:
    """Yields (id of a nested parameter, number of elements of the largest weight in a model that ends with it)."""
    for module in model.modules():
        if isinstance(module, BundledHalf):
            for step, bundle in enumerate(module.all_bundles()):
                yield id(bundle.weight), bundle.hidden * max(layer.bounds[step][1] for layer in module.linears)
        elif isinstance(module, NestedModule):
            for block, (_, stop) in zip(module.blocks, module.bounds, strict=False):  # no blocks if all is bundled
                yield from ((id(parameter), stop) for parameter in block.parameters())  # vectors


def gather_into_shared_memory(model: NestedModel, optimizer) -> None:
    """Makes bundles share memory when they are gathered. Call this after `deepspeed.initialize`, before the first pass.

    It also makes DeepSpeed gather all persistent parameters after a step in one call, instead of one call for each.
    """
    for half in model.modules():
        if isinstance(half, BundledHalf):
            for step, bundle in enumerate(half.all_bundles()):
                setattr(bundle.weight, BUNDLE, (half, step))
    for parameter in model.parameters():
        parameter.all_gather_coalesced = _with_shared_memory(parameter.all_gather_coalesced)  # type: ignore[attr-defined]
    for parameter in optimizer.persistent_parameters[:1]:
        parameter.all_gather = _in_one_call(parameter.all_gather)


def _in_one_call(gather: Callable) -> Callable:
    """Returns DeepSpeed's `all_gather`, changed so that it gathers a list of parameters in one call."""

    def all_gather(param_list: list | None = None, *args, **kwargs):
        if param_list is None or args or kwargs:
            return gather(param_list, *args, **kwargs)
        absent = [parameter for parameter in param_list if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if absent:
            absent[0].all_gather_coalesced(absent).wait()

    return all_gather


def _with_shared_memory(gather: Callable) -> Callable:
    """Returns DeepSpeed's `all_gather_coalesced`, changed so that it returns a handle of `_SharedMemoryHandle`."""

    def all_gather_coalesced(*args, **kwargs):
        handle = gather(*args, **kwargs)
        for part in getattr(handle, "handles", ()):  # on one rank nothing is gathered, and the handle has no parts
            if type(part) is AllGatherCoalescedHandle:
                part.__class__ = _SharedMemoryHandle
        return handle

    return all_gather_coalesced


class _SharedMemoryHandle(AllGatherCoalescedHandle):
    """The handle of parameters that are being gathered in one call. `wait` copies bundles to shared memory."""

    complete: bool

    @torch.no_grad()
    def wait(self, handle_dependency: bool = True) -> None:
        if self.complete:
            return
        self.allgather_handle.wait()
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        offset = 0
        for parameter in self.params:
            share = parameter.ds_tensor.ds_numel  # the shares of the last ranks may be padded
            memory, ranges = self._allocate(parameter, share)
            targets += [memory.narrow(0, target, num) for _, _, target, num in ranges]
            sources += [self.partitions[rank].narrow(0, offset + first, num) for rank, first, _, num in ranges]
            parameter.ds_status = ZeroParamStatus.AVAILABLE
            offset += share
        torch._foreach_copy_(targets, sources)
        if not get_accelerator().is_synchronized_device():  # all shares are views of one tensor
            self.partitions[0].record_stream(get_accelerator().current_stream())
        self.complete = True

    def _allocate(self, parameter: nn.Parameter, share: int) -> tuple[Tensor, "CopyRanges"]:
        """Gives the parameter memory. Returns the memory, and the ranges that must be copied to it."""
        half, step = getattr(parameter, BUNDLE, (None, 0))
        size = parameter.ds_numel  # type: ignore[attr-defined]
        if half is None or parameter.ds_persist:  # type: ignore[attr-defined]
            memory = self.partitions[0].new_empty(size)
            parameter.data = memory.view(parameter.ds_shape)  # type: ignore[attr-defined]
            return memory, copy_ranges((size,), (0,), share)
        memory = half.allocate(step, like=self.partitions[0])
        bundle = half.bundles[step]
        return memory, copy_ranges(bundle.numels, bundle.block_starts, share)


CopyRanges = tuple[tuple[int, int, int, int], ...]
"""Tuples of (rank that has the elements, first element in its share, first element in memory, number of elements)."""


@lru_cache(MAX_CACHED)
def copy_ranges(numels: tuple[int, ...], starts: tuple[int, ...], share: int) -> CopyRanges:
    """Returns the ranges that bring a parameter's blocks from the ranks' shares to their `starts` in memory.

    `numels` are the numbers of elements of the blocks, and `share` is the number of elements of each rank.
    """
    ranges, begin = [], 0
    for numel, start in zip(numels, starts, strict=True):
        end = begin + numel
        for rank in range(begin // share, -(-end // share)):
            first, last = max(begin, rank * share), min(end, (rank + 1) * share)
            ranges.append((rank, first - rank * share, start + first - begin, last - first))
        begin = end
    return tuple(ranges)
