"""This rank's shards of the fp32 master weights and of the optimizer's state, by parameter name.

In: DeepSpeed's engine. Out: a `Shard` for each parameter, or block of a bundle, of which this rank holds elements.
DeepSpeed keeps master weights and state in flat tensors, whose layout depends on the stage. A `Shard` says which
elements of which parameter a range of a flat tensor holds. Checkpoints are read and written through shards, so they
depend neither on the stage nor on the number of ranks. Source of the layouts: DeepSpeed 0.19.8,
runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py, runtime/bf16_optimizer.py, runtime/fp16/unfused_optimizer.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sorted_ds.nested.bundles import Contents, contents_of

MASTER = "weight"
"""The key of the master weights, which stands beside the optimizer's state keys."""


@dataclass(frozen=True)
class Shard:
    """Elements `start` to `start + num` of the parameter `name`, which lie at `offset` in the flat tensor `flat`."""

    name: str
    start: int
    num: int
    flat: Tensor
    offset: int

    def view(self, tensor: Tensor) -> Tensor:
        """Returns this shard's elements of `tensor`, which is `flat` or a state of the same shape, as a view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.num)

    def split(self, contents: Contents) -> "Iterator[Shard]":
        """Yields the shards of the blocks that the parameter consists of."""
        first = 0
        for name, size in zip(contents.names, contents.numels, strict=True):
            begin, end = max(self.start, first), min(self.start + self.num, first + size)
            if begin < end:
                yield Shard(name, begin - first, end - begin, self.flat, self.offset + begin - self.start)
            first += size

    def share(self, rank: int, num_ranks: int) -> "Shard":
        """Returns the share of one rank if all ranks hold this shard and each of them saves an equal share."""
        size = -(-self.num // num_ranks)
        begin, end = min(rank * size, self.num), min((rank + 1) * size, self.num)
        return replace(self, start=self.start + begin, num=end - begin, offset=self.offset + begin)


def shards_of(engine) -> Iterator[Shard]:
    """Yields this rank's shards, with one for each block of a bundle. At stage 0 every rank holds all elements."""
    names = {parameter: name for name, parameter in engine.module.model.named_parameters()}
    stage = engine.zero_optimization_stage()
    if stage == 3:
        contents = contents_of(engine.module.model)
        shards = _stage3(engine.optimizer, names)
        return (block_shard for shard in shards for block_shard in shard.split(contents[shard.name]))
    if stage > 0:
        return _stage1_and_2(engine.optimizer, names)
    return _stage0(engine, names)


def _stage0(engine, names: dict) -> Iterator[Shard]:
    for parameter, flat in stage0_masters(engine):
        yield Shard(names[parameter], 0, parameter.numel(), flat, 0)


def stage0_masters(engine) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields each parameter with its fp32 master weight. In fp32 the two are the same tensor."""
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
    """Returns the groups of parameters and their flat master weights.

    At stage 1 in bf16 with fp32 accumulation, DeepSpeed uses its BF16_Optimizer, which has other attribute names.
    """
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
    """Copies the master weights into the weights that the forward pass uses. Every rank must call this."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if persistent := optimizer.persistent_parameters:
            persistent[0].partition(persistent)  # otherwise the gather would skip them, and they would keep old values
            persistent[0].all_gather(persistent)
    elif stage > 0:
        optimizer.update_lp_params()
    else:
        for parameter, master in stage0_masters(engine):
            if master is not parameter:
                parameter.data.copy_(master)
