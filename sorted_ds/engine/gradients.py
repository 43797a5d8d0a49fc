"""Changes how DeepSpeed accumulates a step's gradients and reduces them over ranks, and clears its accumulators.

In: DeepSpeed's engine or its ZeRO optimizer. Out: the same object, which accumulates and reduces only the gradients of
parameters that the step's passes used, and keeps nothing from the last step.

- DeepSpeed copies a parameter's gradient at the first micro-batch of a step, adds at later ones, and never clears. So a
  parameter that is first used later, or not at all, would get the gradient of the last step (measured: docs/log.md).
  With offload, the norm of each parameter's gradient is stale in the same way. At stages 1 and 2 with offload, fp32
  accumulates in `accumulated_grads_in_cpu`, and bf16 in the fp32 gradients of the master weights.
- At stages 1 and 2 in fp32 without offload, DeepSpeed copies reduced gradients into a new buffer for a rank's share of
  the full network (at stage 2 at each micro-batch), with zeros for unused parameters. The buffer lives as long as any
  gradient in it. Here each gradient has memory of its own from its first use to the optimizer step, so a sub-network
  costs only its own memory and time. In bf16 DeepSpeed accumulates in an fp32 buffer for the full network (stage 1) or
  a rank's share of it (stage 2), whatever was used. This is not changed.
- At stage 0, and at stage 1 in bf16, DeepSpeed reduces zeros for every parameter without a gradient, because ranks
  might use different parameters. Here all ranks run the same passes, so they reduce only the gradients that exist.

Source: DeepSpeed 0.19.8, runtime/zero/stage3.py (`partition_grads`), runtime/zero/stage_1_and_2.py
(`copy_grads_in_partition`, `async_accumulate_grad_in_cpu_via_gpu`, `complete_grad_norm_calculation_for_cpu_offload`),
runtime/engine.py (`buffered_allreduce_fallback`), runtime/bf16_optimizer.py.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def keep_used_gradients(optimizer) -> None:
    """Makes the optimizer keep only the gradients of parameters that a step's passes used.

    This is for stages 1 and 2 in fp32 without offload. Call it once, after `deepspeed.initialize`.
    Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py (`reduce_ipg_grads`,
    `independent_gradient_partition_epilogue`, `finalize_gradient_accumulation_boundary`).
    """
    kept: dict[Tensor, Tensor] = {}
    finalize = optimizer.finalize_gradient_accumulation_boundary

    def copy_grads_in_partition(parameter: Tensor, group: int) -> None:
        """Keeps the gradient of a parameter of this rank's share. DeepSpeed calls this after the reduction."""
        grad = parameter.grad
        assert grad is not None
        kept[parameter] = kept[parameter].add_(grad) if parameter in kept else grad.clone()
        parameter.grad = None  # otherwise a gradient that is too large for the bucket would stay until the pass ends

    def pop_gradients(parameters: list[Tensor]) -> list[Tensor]:
        """Returns the gradients for the update, which needs one, if only zeros, for each parameter of the share."""
        return [kept.pop(p) if p in kept else torch.zeros_like(p) for p in parameters]

    def finalize_gradient_accumulation_boundary() -> None:
        for group, parameters in enumerate(optimizer.params_in_partition):
            optimizer.all_grad_tensors[group] = pop_gradients(parameters)
        finalize()

    optimizer.copy_grads_in_partition = copy_grads_in_partition
    if optimizer.partition_gradients:  # stage 2
        optimizer.get_all_grad_tensors = lambda parameters, dtype: []  # DeepSpeed would add these up
        optimizer.finalize_gradient_accumulation_boundary = finalize_gradient_accumulation_boundary
    else:  # stage 1, where `step` reduces the gradients and then asks for them
        optimizer.get_all_grad_tensors = lambda parameters, dtype: pop_gradients(parameters)


def clear_accumulators(optimizer, stage: int, offload: bool) -> None:
    """Clears all accumulated gradients and norms. Call this after every optimizer step."""
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


def reduce_used_gradients(engine) -> None:
    """Makes stages 0 and 1 reduce only gradients that exist. Call this once, after `deepspeed.initialize`."""
    if hasattr(engine.optimizer, "fp32_groups_has_gradients"):  # stage 1 in bf16
        engine.optimizer.get_grads_for_reduction = lambda: (list(_used_accumulators(engine.optimizer)), {})
    elif engine.zero_optimization_stage() == 0:
        engine._get_gradients_for_reduction = lambda: (_used_gradients(list(engine.module.parameters())), {})


def _used_accumulators(optimizer) -> Iterator[Tensor]:
    """Yields the fp32 accumulators of the parameters that have a gradient."""
    for gradients, are_used in zip(optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True):
        yield from (gradient for gradient, is_used in zip(gradients, are_used, strict=True) if is_used)


def _used_gradients(parameters: list[Tensor]) -> list[Tensor]:
    """Returns the gradients that exist, and sets the others to zeros, so that every parameter is updated."""
    used = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return used
