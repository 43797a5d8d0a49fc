"""Computes what ranks exchange in an optimizer step at each ZeRO stage.

In: the numbers of parameters of the full network and of the sub-networks that a step samples. Out: the bytes of the
tensors that collectives carry, and the bytes that each rank sends. `python -m benchmarks.scaling` compares them with
the bytes that are counted in real steps.

Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py, runtime/bf16_optimizer.py, runtime/zero/stage3.py,
runtime/zero/partitioned_param_coordinator.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

REUSE_DISTANCE = 1_000_000_000
"""DeepSpeed's default for `stage3_max_reuse_distance`, in parameters."""


@dataclass(frozen=True)
class StepSizes:
    """The numbers of parameters of the sub-networks that a step samples."""

    each: Sequence[int]
    """The parameters of each sampled sub-network."""
    union: int
    """The parameters that at least one of them uses."""
    forwards: int
    """Forward passes of each sub-network on each rank."""
    teachers: int = 0
    """The parameters of the passes without a gradient."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of the tensors that collectives carry in one optimizer step."""

    gathered: float = 0
    """Weights in all-gather."""
    reduced: float = 0
    """Gradients in all-reduce."""
    scattered: float = 0
    """Gradients in reduce-scatter."""

    def sent(self, num_ranks: int) -> float:
        """Returns the bytes that each rank sends in ring algorithms, and it receives as many.

        An all-reduce counts twice, because it is a reduce-scatter and an all-gather.

        Source: bus bandwidth in nccl-tests, doc/PERFORMANCE.md.
        """
        return (self.gathered + 2 * self.reduced + self.scattered) * (num_ranks - 1) / num_ranks


def step_traffic(
    stage: int, bf16: bool, full: int, sizes: StepSizes, reuse_distance: int = REUSE_DISTANCE, recomputed: bool = False
) -> Traffic:
    """Returns the traffic of one optimizer step for a full network of `full` parameters.

    Weights and gradients are sent in the model's dtype, even if gradients are accumulated in fp32. Stages 0 and 1
    reduce once per step the gradients of all parameters that a sub-network of the step used. Stages 2 and 3 reduce
    after each micro-batch the gradients of the parameters that it used. Stages 1 and 2 gather all weights after the
    update. Stage 3 gathers the weights of a micro-batch for its forward pass, and gathers again for its backward pass
    those that were not kept in between. This is an upper bound, because DeepSpeed keeps more weights if layer halves
    are smaller than `stage3_prefetch_bucket_size`.

    `recomputed`: whether activation checkpointing uses each layer's weights a third time, right before its backward
    pass.
    """
    width = 2 if bf16 else 4
    used = sizes.forwards * sum(sizes.each)
    if stage == 0:
        return Traffic(reduced=width * sizes.union)
    if stage == 1:
        return Traffic(gathered=width * full, reduced=width * sizes.union)
    if stage == 2:
        return Traffic(gathered=width * full, reduced=width * used)
    kept = reuse_distance // (3 if recomputed else 2)
    gathered_again = sizes.forwards * sum(max(0, size - kept) for size in sizes.each)
    taught = sizes.forwards * sizes.teachers
    return Traffic(gathered=width * (used + gathered_again + taught), scattered=width * used)
