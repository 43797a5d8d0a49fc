"""Where DeepSpeed accumulates a step's gradients, and what must be clean when a step starts.

In: a ZeRO optimizer. Out: nothing is left in it of the step before. DeepSpeed copies a parameter's gradient at the
first micro-batch of a step, adds at later ones, and never clears: a parameter that is first used later, or not at all,
would get the gradient of the step before (measured: docs/log.md). With offload the norms that are kept for each
parameter are stale in the same way. At stages 1 and 2 with offload, fp32 accumulates in `accumulated_grads_in_cpu`, and
bf16 in the fp32 gradients of the master weights alone.

None of these attributes is a documented interface, so they are looked for when the engine is built. Source: DeepSpeed
0.19.8, runtime/zero/stage3.py (`partition_grads`), runtime/zero/stage_1_and_2.py
(`async_accumulate_grad_in_cpu_via_gpu`, `complete_grad_norm_calculation_for_cpu_offload`).
"""

from collections.abc import Iterator

import deepspeed
from torch import Tensor

from sorted_ds.errors import UserError

NEEDED = {
    (3, False): ("grad_partitions_flat_buffer",),
    (3, True): ("grad_partitions_flat_buffer", "fp32_partitioned_groups_flat", "norm_for_param_grads"),
    (2, True): ("accumulated_grads_in_cpu", "single_partition_of_fp32_groups", "norm_for_param_grads"),
}
NEEDED[1, True] = NEEDED[2, True]
"""Attributes by ZeRO stage and offload. Elsewhere DeepSpeed starts clean by itself."""


def check(optimizer, stage: int, offload: bool) -> None:
    """Raises: UserError when this DeepSpeed keeps its accumulators elsewhere: a run would be silently wrong."""
    for name in NEEDED.get((stage, offload), ()):
        if not hasattr(optimizer, name):
            raise UserError(
                f"DeepSpeed {deepspeed.__version__} has no {name}, where 0.19.8 accumulates at stage {stage}. "
                "Install deepspeed==0.19.8, or use stage 2 without offload."
            )


def clean(optimizer, stage: int, offload: bool) -> None:
    """After every optimizer step."""
    for accumulator in _accumulators(optimizer, stage, offload):
        accumulator.zero_()
    if offload:
        optimizer.norm_for_param_grads.clear()


def _accumulators(optimizer, stage: int, offload: bool) -> Iterator[Tensor]:
    if stage == 3:
        yield optimizer.grad_partitions_flat_buffer
    if offload:
        masters = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
        yield from (master.grad for master in masters if master.grad is not None)
    if offload and stage < 3:
        yield from optimizer.accumulated_grads_in_cpu.values()
