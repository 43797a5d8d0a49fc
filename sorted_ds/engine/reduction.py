"""At stage 0, and at stage 1 in bf16, ranks reduce the gradients of what a step's samples used, and no others.

In: DeepSpeed's engine. Out: the same one. DeepSpeed reduces zeros for every parameter that has no gradient, because its
ranks might differ in which ones do; ours sample alike. Elsewhere it reduces what a backward pass has reached.
Source: DeepSpeed 0.19.8, runtime/engine.py (`buffered_allreduce_fallback`), runtime/bf16_optimizer.py.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


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
