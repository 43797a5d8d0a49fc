"""How DeepSpeed accumulates a step's gradients and reduces them over ranks, and what must be clean when a step starts.

In: DeepSpeed's engine or its ZeRO optimizer. Out: the same object, which keeps and reduces the gradients of what the
step's passes used and of nothing else, and in which nothing is left of the step before.

- DeepSpeed copies a parameter's gradient at the first micro-batch of a step, adds at later ones, and never clears: a
  parameter that is first used later, or not at all, would get the gradient of the step before (measured: docs/log.md).
  With offload the norms that are kept for each parameter are stale in the same way. At stages 1 and 2 with offload,
  fp32 accumulates in `accumulated_grads_in_cpu`, and bf16 in the fp32 gradients of the master weights alone.
- At stages 1 and 2 in fp32 without offload, DeepSpeed copies reduced gradients into a new buffer of a rank's part of
  the full network, at stage 2 with each micro-batch, and keeps it as long as any of them, with zeros for what was not
  used. Here a parameter's gradient is kept by itself from its first use to the optimizer step, so a sub-network costs
  its own memory and its own time. In bf16 DeepSpeed accumulates in an fp32 buffer, at stage 1 of the full network and
  at stage 2 of a rank's part of it, whatever was used; that stays so.
- At stage 0, and at stage 1 in bf16, DeepSpeed reduces zeros for every parameter that has no gradient, because its
  ranks might differ in which ones do. All ranks here run the same passes, so they reduce what was used alone.

Source: DeepSpeed 0.19.8, runtime/zero/stage3.py (`partition_grads`), runtime/zero/stage_1_and_2.py
(`copy_grads_in_partition`, `async_accumulate_grad_in_cpu_via_gpu`, `complete_grad_norm_calculation_for_cpu_offload`),
runtime/engine.py (`buffered_allreduce_fallback`), runtime/bf16_optimizer.py.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def keep_what_is_used(optimizer) -> None:
    """At stages 1 and 2 in fp32 without offload: keeps gradients of what a step's samples used, and of nothing else.

    Call once, after `deepspeed.initialize`. Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py
    (`reduce_ipg_grads`, `independent_gradient_partition_epilogue`, `finalize_gradient_accumulation_boundary`).
    """
    kept: dict[Tensor, Tensor] = {}
    finalize = optimizer.finalize_gradient_accumulation_boundary

    def copy_grads_in_partition(parameter: Tensor, group: int) -> None:
        """Called when the gradient of a parameter of this rank's is reduced in a shared buffer."""
        grad = parameter.grad
        assert grad is not None
        kept[parameter] = kept[parameter].add_(grad) if parameter in kept else grad.clone()
        parameter.grad = None  # or one that is too large for the shared buffer would stay until the pass ends

    def handed_over(parameters: list[Tensor]) -> list[Tensor]:
        """For the update, which is of all of a rank's part."""
        return [kept.pop(p) if p in kept else torch.zeros_like(p) for p in parameters]

    def finalize_gradient_accumulation_boundary() -> None:
        for group, parameters in enumerate(optimizer.params_in_partition):
            optimizer.all_grad_tensors[group] = handed_over(parameters)
        finalize()

    optimizer.copy_grads_in_partition = copy_grads_in_partition
    if optimizer.partition_gradients:  # stage 2
        optimizer.get_all_grad_tensors = lambda parameters, dtype: []  # what DeepSpeed would add up after a micro-batch
        optimizer.finalize_gradient_accumulation_boundary = finalize_gradient_accumulation_boundary
    else:  # stage 1, where `step` reduces and asks for them then
        optimizer.get_all_grad_tensors = lambda parameters, dtype: handed_over(parameters)


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


def reduce_what_is_used(engine) -> None:
    """Call once, after `deepspeed.initialize`."""
    if hasattr(engine.optimizer, "fp32_groups_has_gradients"):  # stage 1 in bf16
        engine.optimizer.get_grads_for_reduction = lambda: (list(_accumulated(engine.optimizer)), {})
    elif engine.zero_optimization_stage() == 0:
        engine._get_gradients_for_reduction = lambda: (_of_parameters(list(engine.module.parameters())), {})


def _accumulated(optimizer) -> Iterator[Tensor]:
    """In fp32."""
    for gradients, are_there in zip(optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True):
        yield from (gradient for gradient, is_there in zip(gradients, are_there, strict=True) if is_there)


def _of_parameters(parameters: list[Tensor]) -> list[Tensor]:
    """Those that are there. The others become zeros, so that every parameter is updated."""
    there = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return there
