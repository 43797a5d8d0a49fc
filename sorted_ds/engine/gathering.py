"""Under ZeRO-3, what a layer half gathers when it is called: the bundles that are drawn, and no others.

DeepSpeed gathers the parameters that a called module owns and those that it lists as *external*: owned elsewhere, used
here. Bundles and blocks are modules of their own that are never called; the list of a half is what is drawn of it. So a
half costs one fetch and one release, with a parameter for each width step.
What was gathered is copied once out of the buffer that all ranks' shares arrive in. DeepSpeed gives each parameter
memory of its own there; here the drawn bundles of a half lie apart, the blocks of each weight one after the other, so
that each weight is one matrix without a further copy. (Not where the first bundles stay gathered or a prefetch has cut
the half, nor on one rank, which gathers nothing.)
Source: DeepSpeed 0.19.8, runtime/zero/partition_parameters.py (`_init_external_params`, which keeps a list that is
there; `AllGatherCoalescedHandle.wait`), runtime/zero/partitioned_param_coordinator.py (`iter_params`).
"""

from collections import defaultdict
from collections.abc import Callable, ItemsView, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus
from torch import Tensor, nn

from sorted_ds.nested import NestedModel
from sorted_ds.nested.bundles import BundledHalf
from sorted_ds.nested.layers import NestedLayer, Width

BUNDLE = "sorted_ds_bundle"
"""Attribute of a bundle's parameter: the half, and the number of the width step."""

PLANS = 1024
"""Plans that are kept: a few for each width that is drawn."""


def gather_drawn(model: NestedModel) -> None:
    """Call before `deepspeed.initialize`."""
    for module in model.modules():
        if isinstance(module, BundledHalf):
            _gather_for(module, module.width, _of_half(module))
        elif isinstance(module, NestedLayer) and "weight" in module.names:  # a norm
            _gather_for(module, module.width, [dict(block.named_parameters()) for block in module.blocks])


def _gather_for(module: nn.Module, width: Width, by_steps: Sequence[dict[str, nn.Parameter]]) -> None:
    """`by_steps`: what each width step adds. DeepSpeed asks several times a call, so the answers are made once."""
    own = [{f"{step}.{name}": p for name, p in added.items()} for step, added in enumerate(by_steps)]
    prefixes = list(accumulate(own, lambda before, more: before | more))

    def drawn() -> ItemsView[str, nn.Parameter]:
        return prefixes[width.num_steps - 1].items()

    module._external_params = {}  # type: ignore[assignment]
    module.ds_external_parameters = drawn  # type: ignore[assignment]


def _of_half(half: BundledHalf) -> list[dict[str, nn.Parameter]]:
    """The bundle and the biases of each width step, and with the first the biases that are not nested."""
    by_steps: list[dict[str, nn.Parameter]] = [dict(bundle.named_parameters()) for bundle in half.all_bundles()]
    for name, layer in zip(half.names, half.linears, strict=True):
        for added, block in zip(by_steps, layer.blocks, strict=True):
            added |= {f"{name}.{kind}": parameter for kind, parameter in block.named_parameters()}
        by_steps[0] |= {f"{name}.{kind}": p for kind, p in layer.named_parameters(recurse=False)}
    return by_steps


def persist_as_extracted(model: NestedModel, optimizer) -> None:
    """Keeps a parameter gathered between passes where the extracted model that ends with it would keep its weights.

    That is, where all blocks up to it, of each weight, are together not above `stage3_param_persistence_threshold`.
    DeepSpeed looks at each alone, so a space with many widths would keep whole layers on every rank. Call after
    `deepspeed.initialize`, before the first pass. Source: DeepSpeed 0.19.8, runtime/zero/parameter_offload.py
    (`mark_persistent_parameters`).
    """
    offload, persistent = optimizer.parameter_offload, optimizer.persistent_parameters
    largest = dict(_largest_weights(model))
    num_elements = 0
    persistent.clear()
    for parameter in model.parameters():
        size = parameter.ds_numel  # type: ignore[attr-defined]
        is_small = largest.get(id(parameter), size) <= offload.param_numel_persistence_threshold
        parameter.ds_persist = is_small and num_elements + size <= offload.model_persistence_threshold  # type: ignore
        if parameter.ds_persist:  # type: ignore[attr-defined]
            num_elements += size
            persistent.append(parameter)


def _largest_weights(model: NestedModel) -> Iterator[tuple[int, int]]:
    """Of each nested parameter, by its id: elements of the largest weight of a model that ends with it."""
    for module in model.modules():
        if isinstance(module, BundledHalf):
            for step, bundle in enumerate(module.all_bundles()):
                yield id(bundle.weight), bundle.hidden * max(layer.bounds[step][1] for layer in module.linears)
        elif isinstance(module, NestedLayer):
            for block, (_, stop) in zip(module.blocks, module.bounds, strict=True):
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
        shares = [parameter.ds_tensor.ds_numel for parameter in self.params]  # the last ranks' may be padded
        offsets = list(accumulate(shares, initial=0))
        rooms: list[Tensor] = []
        pieces: list[Tensor] = []
        for group in self._groups():
            plan = _plan(*zip(*((_block_sizes(self.params[n]), offsets[n], shares[n]) for n in group), strict=True))
            memory = self.partitions[0].new_empty(sum(plan.sizes))
            rooms += memory.split(plan.sizes)
            pieces += [self.partitions[rank].narrow(0, first, size) for rank, first, size in plan.pieces]
            _give([self.params[n] for n in group], memory, plan)
        torch._foreach_copy_(rooms, pieces)
        if not get_accelerator().is_synchronized_device():  # all shares are parts of one tensor
            self.partitions[0].record_stream(get_accelerator().current_stream())
        self.complete = True

    def _groups(self) -> Iterator[list[int]]:
        """Numbers of the parameters that share memory: the bundles of a half that come and go, in order."""
        halves: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, parameter in enumerate(self.params):
            half, _ = getattr(parameter, BUNDLE, (None, None))
            halves[(id(half), -1) if half is not None and not parameter.ds_persist else (0, number)].append(number)
        for group in halves.values():
            yield sorted(group, key=lambda number: getattr(self.params[number], BUNDLE, (None, 0))[1])


@dataclass(frozen=True)
class _Plan:
    """Where the blocks of parameters lie in their common memory, and what they are put together from."""

    pieces: list[tuple[int, int, int]]
    """In the order of the memory: of whose rank's shares, from which element on, how many."""
    sizes: list[int]
    """Elements of the pieces."""
    starts: list[list[int]]
    """Of each parameter: the first element of each block."""


@lru_cache(PLANS)
def _plan(blocks: tuple[tuple[int, ...], ...], offsets: tuple[int, ...], shares: tuple[int, ...]) -> _Plan:
    """`blocks`: elements of each block of each parameter. A rank's share of a parameter has an offset and a size."""
    pieces: list[tuple[int, int, int]] = []
    starts: list[list[int]] = [[] for _ in blocks]
    end = 0
    for number in range(len(blocks[0])):
        for sizes, offset, share, own in zip(blocks, offsets, shares, starts, strict=True):
            own.append(end)
            pieces += _pieces_of(sum(sizes[:number]), sizes[number], offset, share)
            end += sizes[number]
    return _Plan(pieces, [size for _, _, size in pieces], starts)


def _pieces_of(first: int, num: int, offset: int, share: int) -> Iterator[tuple[int, int, int]]:
    """Elements of a parameter by the ranks that hold them."""
    for rank in range(first // share, (first + num - 1) // share + 1):
        begin, end = max(first, rank * share), min(first + num, (rank + 1) * share)
        yield rank, offset + begin - rank * share, end - begin


def _block_sizes(parameter: nn.Parameter) -> tuple[int, ...]:
    half, step = getattr(parameter, BUNDLE, (None, 0))
    return (parameter.ds_numel,) if half is None else half.bundles[step].sizes  # type: ignore[attr-defined]


def _give(parameters: Sequence[nn.Parameter], memory: Tensor, plan: _Plan) -> None:
    """Memory that is shared by the bundles of a half, or one parameter's own."""
    rooms = memory.split([parameter.ds_numel for parameter in parameters])  # type: ignore[attr-defined]
    for parameter, room, starts in zip(parameters, rooms, plan.starts, strict=True):
        room = room.view(parameter.ds_shape)  # type: ignore[attr-defined]
        if len(parameters) > 1:
            half, step = getattr(parameter, BUNDLE)
            half.bundles[step].lay_apart(memory, room, starts)
        else:
            parameter.data = room
        parameter.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
