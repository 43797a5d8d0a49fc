"""This rank's shards of the fp32 master weights and of the optimizer's state, by parameter name.

DeepSpeed keeps them in flat tensors whose layout differs by stage; a `Shard` says which elements of which parameter a
piece of a flat tensor is. Saving reads through shards and loading writes through them, so a checkpoint knows neither
stage nor number of ranks. Source of the layouts: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py,
runtime/zero/stage3.py, runtime/bf16_optimizer.py, runtime/fp16/unfused_optimizer.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sorted_ds.nested.bundles import Parts, parts_of

MASTER = "weight"
"""The key of the master weights beside the optimizer's own state keys."""


@dataclass(frozen=True)
class Shard:
    """Elements `start` to `start + num` of the flattened parameter `name`, at `offset` of the flat tensor `flat`."""

    name: str
    start: int
    num: int
    flat: Tensor
    offset: int

    def view(self, tensor: Tensor) -> Tensor:
        """This shard's elements of `tensor`, which is `flat` or a state of the same shape."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.num)

    def split(self, parts: Parts) -> "Iterator[Shard]":
        """By what the parameter consists of."""
        first = 0
        for name, size in zip(parts.names, parts.sizes, strict=True):
            begin, end = max(self.start, first), min(self.start + self.num, first + size)
            if begin < end:
                yield Shard(name, begin - first, end - begin, self.flat, self.offset + begin - self.start)
            first += size

    def share(self, rank: int, num_ranks: int) -> "Shard":
        """One of `num_ranks` equal shares of it, where every rank holds the same and each writes a part."""
        size = -(-self.num // num_ranks)
        begin, end = min(rank * size, self.num), min((rank + 1) * size, self.num)
        return replace(self, start=self.start + begin, num=end - begin, offset=self.offset + begin)


def shards_of(engine) -> Iterator[Shard]:
    """Every shard that this rank holds, those of bundles by their blocks. At stage 0 all ranks hold everything."""
    names = {parameter: name for name, parameter in engine.module.model.named_parameters()}
    stage = engine.zero_optimization_stage()
    if stage == 3:
        parts = parts_of(engine.module.model)
        return (piece for shard in _stage3(engine.optimizer, names) for piece in shard.split(parts[shard.name]))
    if stage > 0:
        return _stage1_and_2(engine.optimizer, names)
    return _stage0(engine, names)


def _stage0(engine, names: dict) -> Iterator[Shard]:
    for parameter, flat in stage0_masters(engine):
        yield Shard(names[parameter], 0, parameter.numel(), flat, 0)


def stage0_masters(engine) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter and its fp32 master, which is the parameter itself in fp32."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups"):
        for group in optimizer.param_groups:
            yield from ((parameter, parameter) for parameter in group["params"])
        return
    for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(parameters, masters, strict=True)


def _stage1_and_2(optimizer, names: dict) -> Iterator[Shard]:
    groups, flats = _groups_and_flats(optimizer)
    for parameters, flat in zip(groups, flats, strict=True):
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:
                lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Shard(names[parameter], lp.start, lp.numel, flat, hp.start)


def _groups_and_flats(optimizer) -> tuple[list, list]:
    """Stage 1 in bf16 with fp32 accumulation is DeepSpeed's BF16_Optimizer, with names of its own."""
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
    return optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups


def _stage3(optimizer, names: dict) -> Iterator[Shard]:
    for parameters in optimizer.fp16_groups:
        for parameter in parameters:
            group, offset, num = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = num * torch.distributed.get_rank()
            num = min(num, parameter.ds_numel - start)
            if num > 0:
                yield Shard(names[parameter], start, num, optimizer.fp32_partitioned_groups_flat[group], offset)


def publish_masters(engine) -> None:
    """Copies the master weights into the weights that the forward pass uses, on all ranks."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if persistent := optimizer.persistent_parameters:
            persistent[0].partition(persistent)  # or the gather would find them there, with their old values
            persistent[0].all_gather(persistent)
    elif stage > 0:
        optimizer.update_lp_params()
    else:
        for parameter, master in stage0_masters(engine):
            if master is not parameter:
                parameter.data.copy_(master)
