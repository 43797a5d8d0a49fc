"""Under ZeRO-3, what a layer half gathers when it is called: the bundles that are active, and no others.

DeepSpeed gathers the parameters that a called module owns and those that it lists as *external*: owned elsewhere, used
here. Bundles and blocks are modules of their own that are never called; the list of a half has the active ones. So a
half costs one fetch and one release, with a parameter for each width step.
What was gathered is copied once out of the buffer that all ranks' shares arrive in. DeepSpeed gives each parameter
memory of its own there; here the active bundles of a half share theirs, the blocks of each weight one after the other,
so that each weight is one matrix without a further copy, also where DeepSpeed's prefetch cuts the half. (Not where its
first bundles stay gathered, nor on one rank, where nothing is gathered.)
Source: DeepSpeed 0.19.8, runtime/zero/partition_parameters.py (`_init_external_params`, which keeps a list that is
there; `AllGatherCoalescedHandle.wait`), runtime/zero/partitioned_param_coordinator.py (`iter_params`).
"""

from collections.abc import Callable, ItemsView, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus
from torch import Tensor, nn

from sorted_ds.nested import NestedModel
from sorted_ds.nested.blocks import NestedModule, Width
from sorted_ds.nested.bundles import BundledHalf
from sorted_ds.nested.owned import OwnedModule

BUNDLE = "sorted_ds_bundle"
"""Attribute of a bundle's parameter: the half, and the number of the width step."""

KEPT = 4096
"""Answers of `pieces_of` that are kept: one for each number of width steps of each bundle, while they fit."""


def gather_active(model: NestedModel) -> None:
    """Call before `deepspeed.initialize`."""
    for module in model.modules():
        if isinstance(module, BundledHalf):
            _gather_for(module, module.width, _of_half(module))
        elif isinstance(module, NestedModule) and "weight" in module.names:  # a norm
            _gather_for(module, module.width, [dict(block.named_parameters()) for block in module.blocks])
        elif isinstance(module, OwnedModule):
            _gather_own_copy(module)


def _gather_for(module: nn.Module, width: Width, by_steps: Sequence[dict[str, nn.Parameter]]) -> None:
    """`by_steps`: what each width step adds. DeepSpeed asks several times a call, so the answers are made once."""
    own = [{f"{step}.{name}": p for name, p in added.items()} for step, added in enumerate(by_steps)]
    prefixes = list(accumulate(own, lambda before, more: before | more))

    def active() -> ItemsView[str, nn.Parameter]:
        return prefixes[width.num_steps - 1].items()

    module._external_params = {}  # type: ignore[assignment]
    module.ds_external_parameters = active  # type: ignore[assignment]


def _gather_own_copy(module: OwnedModule) -> None:
    """The copy that the active sub-network owns."""
    copies = {owner: dict(copy.named_parameters()) for owner, copy in module.copies.items()}
    module._external_params = {}  # type: ignore[assignment]
    module.ds_external_parameters = lambda: copies[module.owner].items()  # type: ignore[assignment]


def _of_half(half: BundledHalf) -> list[dict[str, nn.Parameter]]:
    """The bundle and the biases of each width step, and with the first the biases that are not nested."""
    by_steps: list[dict[str, nn.Parameter]] = [dict(bundle.named_parameters()) for bundle in half.all_bundles()]
    for name, layer in zip(half.names, half.linears, strict=True):
        for added, block in zip(by_steps, layer.blocks, strict=False):  # none where there is no bias
            added |= {f"{name}.{kind}": parameter for kind, parameter in block.named_parameters()}
        by_steps[0] |= {f"{name}.{kind}": p for kind, p in layer.named_parameters(recurse=False)}
    return by_steps


def persist_as_extracted(model: NestedModel, optimizer) -> None:
    """Keeps a parameter gathered between passes where the extracted model that ends with it would keep its weights.

    That is, where all blocks up to it, of each weight, are together not above `stage3_param_persistence_threshold`; of
    a bundle, all its weights. (Where the extracted model keeps its small key and value weights alone, here they come
    and go with the rest of the attention.) DeepSpeed looks at each parameter alone, so a space with many widths would
    keep whole layers on every rank. Call after `deepspeed.initialize`, before the first pass.
    Source: DeepSpeed 0.19.8, runtime/zero/parameter_offload.py (`mark_persistent_parameters`).
    """
    threshold = optimizer.parameter_offload.param_numel_persistence_threshold
    largest = dict(_largest_weights(model))
    for parameter in model.parameters():
        size = largest.get(id(parameter), parameter.ds_numel)  # type: ignore[attr-defined]
        parameter.ds_persist = size <= threshold  # type: ignore[attr-defined]
    optimizer.persistent_parameters[:] = [p for p in model.parameters() if p.ds_persist]  # type: ignore[attr-defined]


def _largest_weights(model: NestedModel) -> Iterator[tuple[int, int]]:
    """Of each nested parameter, by its id: elements of the largest weight of a model that ends with it."""
    for module in model.modules():
        if isinstance(module, BundledHalf):
            for step, bundle in enumerate(module.all_bundles()):
                yield id(bundle.weight), bundle.hidden * max(layer.bounds[step][1] for layer in module.linears)
        elif isinstance(module, NestedModule):
            for block, (_, stop) in zip(module.blocks, module.bounds, strict=False):  # none where all is in bundles
                yield from ((id(parameter), stop) for parameter in block.parameters())  # vectors


def gather_side_by_side(model: NestedModel, optimizer) -> None:
    """Call after `deepspeed.initialize`, before the first pass.

    The parameters that stay, which DeepSpeed gathers after each step with a call for each, take one call.
    """
    for half in model.modules():
        if isinstance(half, BundledHalf):
            for step, bundle in enumerate(half.all_bundles()):
                setattr(bundle.weight, BUNDLE, (half, step))
    for parameter in model.parameters():
        parameter.all_gather_coalesced = _adopting(parameter.all_gather_coalesced)  # type: ignore[attr-defined]
    for parameter in optimizer.persistent_parameters[:1]:
        parameter.all_gather = _in_one_call(parameter.all_gather)


def _in_one_call(gather: Callable) -> Callable:
    def all_gather(param_list: list | None = None, *args, **kwargs):
        if param_list is None or args or kwargs:
            return gather(param_list, *args, **kwargs)
        absent = [parameter for parameter in param_list if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if absent:
            absent[0].all_gather_coalesced(absent).wait()

    return all_gather


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
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        offset = 0
        for parameter in self.params:
            share = parameter.ds_tensor.ds_numel  # the last ranks' shares may be padded
            memory, pieces = self._room(parameter, share)
            targets += [memory.narrow(0, target, num) for _, _, target, num in pieces]
            sources += [self.partitions[rank].narrow(0, offset + first, num) for rank, first, _, num in pieces]
            parameter.ds_status = ZeroParamStatus.AVAILABLE
            offset += share
        torch._foreach_copy_(targets, sources)
        if not get_accelerator().is_synchronized_device():  # all shares are parts of one tensor
            self.partitions[0].record_stream(get_accelerator().current_stream())
        self.complete = True

    def _room(self, parameter: nn.Parameter, share: int) -> tuple[Tensor, "Pieces"]:
        """Memory that the parameter is given, and what to copy there."""
        half, step = getattr(parameter, BUNDLE, (None, 0))
        size = parameter.ds_numel  # type: ignore[attr-defined]
        if half is None or parameter.ds_persist:  # type: ignore[attr-defined]
            memory = self.partitions[0].new_empty(size)
            parameter.data = memory.view(parameter.ds_shape)  # type: ignore[attr-defined]
            return memory, pieces_of((size,), (0,), share)
        memory = half.room(step, like=self.partitions[0])
        bundle = half.bundles[step]
        return memory, pieces_of(bundle.sizes, bundle.starts, share)


Pieces = tuple[tuple[int, int, int, int], ...]
"""Of what is gathered: the rank whose share it is in, its first element there and where it goes, number of elements."""


@lru_cache(KEPT)
def pieces_of(sizes: tuple[int, ...], starts: tuple[int, ...], share: int) -> Pieces:
    """A parameter of blocks with `sizes` elements, which go to `starts`; each rank has `share` of its elements."""
    pieces, begin = [], 0
    for size, start in zip(sizes, starts, strict=True):
        end = begin + size
        for rank in range(begin // share, -(-end // share)):
            first, last = max(begin, rank * share), min(end, (rank + 1) * share)
            pieces.append((rank, first - rank * share, start + first - begin, last - first))
        begin = end
    return tuple(pieces)
