"""Partitions each parameter for ZeRO-3 as soon as it is filled, so that no rank ever holds the whole model.

In: a filled parameter. Out: the same parameter, of which this rank keeps its share, as after `deepspeed.initialize`.
DeepSpeed itself fills a parameter on every rank and then broadcasts the values of rank 0. Here every rank fills it with
the same values, from the same file or the same random numbers, so nothing is sent, and no rank waits for one that
failed. Source: DeepSpeed 0.19.8, runtime/zero/partition_parameters.py (`_zero_init_param`),
runtime/zero/parameter_offload.py (`_convert_to_zero_parameters`, which skips partitioned parameters).
"""

import copy
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO

import deepspeed
from torch import nn

from sorted_ds.cluster.ranks import Ranks
from sorted_ds.engine.modes import complete_config


def partitioner(config: dict, micro_batch_rows: int, clip_norm: float, ranks: Ranks) -> Callable[[nn.Parameter], None]:
    """Returns a function that partitions a parameter for an `Engine` with the same arguments.

    Every rank must call this. The returned function may be called by one rank alone.
    """
    with redirect_stdout(StringIO()):  # on the CPU, DeepSpeed prints that it built its ops
        deepspeed.init_distributed(dist_init_required=False)
    # Init gets an empty module, because with a module it replaces F.linear. The plain F.linear would keep gathered
    # weights until the backward pass.
    full = complete_config(config, micro_batch_rows, ranks.size, clip_norm)
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=copy.deepcopy(full))

    def partition(parameter: nn.Parameter) -> None:
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]

    return partition
