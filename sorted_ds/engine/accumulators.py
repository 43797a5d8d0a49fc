"""Where DeepSpeed accumulates a step's gradients, and what must be clean when a step starts.

In: a ZeRO optimizer. Out: nothing is left in it of the step before. DeepSpeed copies a parameter's gradient at the
first micro-batch of a step, adds at later ones, and never clears: a parameter that is first used later, or not at all,
would get the gradient of the step before (measured: docs/log.md). With offload the norms that are kept for each
parameter are stale in the same way. At stages 1 and 2 with offload, fp32 accumulates in `accumulated_grads_in_cpu`, and
bf16 in the fp32 gradients of the master weights alone.

At stage 2 in fp32 without offload, DeepSpeed keeps a list of gradients from micro-batch to micro-batch, filled up with
zeros where a parameter was not used, so a small draw would cost a pass over a rank's part of the full network's
gradients and their memory. Here the gaps stay open until the optimizer step.

None of these attributes is a documented interface, so they are looked for when the engine is built. Source: DeepSpeed
0.19.8, runtime/zero/stage3.py (`partition_grads`), runtime/zero/stage_1_and_2.py
(`async_accumulate_grad_in_cpu_via_gpu`, `complete_grad_norm_calculation_for_cpu_offload`).
"""

from collections.abc import Iterator, Sequence

import deepspeed
import torch
from torch import Tensor

from sorted_ds.errors import UserError

NEEDED = {
    (3, False): ("grad_partitions_flat_buffer",),
    (3, True): ("grad_partitions_flat_buffer", "fp32_partitioned_groups_flat", "norm_for_param_grads"),
    (2, True): ("accumulated_grads_in_cpu", "single_partition_of_fp32_groups", "norm_for_param_grads"),
}
NEEDED[1, True] = NEEDED[2, True]
NEEDED[2, False] = (
    *("all_grad_tensors", "get_all_grad_tensors", "get_param_gradient_attribute", "params_in_partition"),
    "finalize_gradient_accumulation_boundary",
)
"""What is used here, by ZeRO stage and offload. Elsewhere nothing is: DeepSpeed starts clean by itself."""


def check(optimizer, stage: int, offload: bool) -> None:
    """Raises: UserError when this DeepSpeed keeps its accumulators elsewhere: a run would be silently wrong."""
    for name in NEEDED.get((stage, offload), ()):
        if not hasattr(optimizer, name):
            raise UserError(
                f"DeepSpeed {deepspeed.__version__} has no {name}, where 0.19.8 accumulates at stage {stage}. "
                "Install deepspeed==0.19.8, or use stage 1 without offload."
            )


def leave_gaps_open(optimizer) -> None:
    """At stage 2 without offload: keeps no gradient for what no micro-batch of the step has used yet.

    Call once, after `deepspeed.initialize`. Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py
    (`independent_gradient_partition_epilogue`, `finalize_gradient_accumulation_boundary`).
    """
    finalize = optimizer.finalize_gradient_accumulation_boundary

    def get_all_grad_tensors(parameters: Sequence[Tensor], dtype: torch.dtype) -> list:
        """Of a group's parameters. DeepSpeed keeps the first answer of a step, and adds the later ones to it."""
        (group,) = (n for n, own in enumerate(optimizer.params_in_partition) if own is parameters)
        new = [optimizer.get_param_gradient_attribute(parameter) for parameter in parameters]
        kept = optimizer.all_grad_tensors.get(group)
        if kept is None:
            return new
        for number, grad in enumerate(new):
            if grad is not None:
                kept[number] = grad if kept[number] is None else kept[number].add_(grad)
        return []  # nothing is left to add

    def finalize_gradient_accumulation_boundary() -> None:
        for group, kept in optimizer.all_grad_tensors.items():
            for number, parameter in enumerate(optimizer.params_in_partition[group] if kept else ()):
                if kept[number] is None:
                    kept[number] = torch.zeros_like(parameter, dtype=optimizer.gradient_accumulation_dtype)
        finalize()

    optimizer.get_all_grad_tensors = get_all_grad_tensors
    optimizer.finalize_gradient_accumulation_boundary = finalize_gradient_accumulation_boundary


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
