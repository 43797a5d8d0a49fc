"""ZeRO-3 from the first parameter on: each is partitioned as soon as it is filled, so no rank ever holds the model.

In: a filled parameter. Out: the same parameter without its values, of which this rank keeps its part, as
`deepspeed.initialize` would have left it. DeepSpeed's own way fills a parameter on every rank and then broadcasts rank
0's; here every rank fills it alike, from the same file or the same random numbers, so nothing is sent, and a rank that
fails leaves no other one waiting. Source: DeepSpeed 0.19.8, runtime/zero/partition_parameters.py (`_zero_init_param`),
runtime/zero/parameter_offload.py (`_convert_to_zero_parameters`, which leaves alone what is partitioned already).
"""

import copy
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO

import deepspeed
from torch import nn

from sorted_ds.cluster.ranks import Ranks
from sorted_ds.engine.modes import complete


def partitioner(config: dict, micro_batch_rows: int, clip_norm: float, ranks: Ranks) -> Callable[[nn.Parameter], None]:
    """Partitions a parameter for an `Engine` of the same arguments. A collective; calling the result is none."""
    with redirect_stdout(StringIO()):  # on the CPU it tells that it built its ops
        deepspeed.init_distributed(dist_init_required=False)
    # An empty module: with one, Init also replaces F.linear, whose plain form keeps gathered weights until backward.
    full = complete(config, micro_batch_rows, ranks.size, clip_norm)
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=copy.deepcopy(full))

    def partition(parameter: nn.Parameter) -> None:
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]

    return partition
