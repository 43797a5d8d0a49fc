"""What ranks exchange in an optimizer step, at each ZeRO stage.

In: numbers of parameters, of the full network and of a step's samples. Out: the bytes of the tensors that collectives
carry, and how many of them each rank sends. `python -m benchmarks.scaling` compares with what is counted.
Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py, runtime/bf16_optimizer.py, runtime/zero/stage3.py,
runtime/zero/partitioned_param_coordinator.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

REUSE_DISTANCE = 1_000_000_000
"""DeepSpeed's default of `stage3_max_reuse_distance`, in parameters."""


@dataclass(frozen=True)
class Samples:
    """The parameters of a step's sub-networks."""

    each: Sequence[int]
    union: int
    """Of those that any of them uses."""
    forwards: int
    """Micro-batches of each, on each rank."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of the tensors that collectives carry in one optimizer step."""

    gathered: float = 0
    """Weights, by all-gather."""
    reduced: float = 0
    """Gradients, by all-reduce."""
    scattered: float = 0
    """Gradients, by reduce-scatter."""

    def sent(self, num_ranks: int) -> float:
        """Bytes that each rank sends, and receives, by ring algorithms: an all-reduce scatters and gathers.

        Source: bus bandwidth in nccl-tests, doc/PERFORMANCE.md.
        """
        return (self.gathered + 2 * self.reduced + self.scattered) * (num_ranks - 1) / num_ranks


def step_traffic(
    stage: int, bf16: bool, full: int, samples: Samples, reuse_distance: int = REUSE_DISTANCE, recomputed: bool = False
) -> Traffic:
    """Of one optimizer step. Weights and gradients travel in the model's dtype, also where they accumulate in fp32.

    Stages 0 and 1 reduce once what any sample used; stages 2 and 3 what a micro-batch used, every time. Stages 1 and 2
    gather all weights after the update; stage 3 gathers those of a micro-batch for its forward pass, and again for its
    backward pass those that were not kept in between. `recomputed`: with activation checkpointing, where each layer's
    weights are used a third time, right before its backward pass. Where layer halves are smaller than
    `stage3_prefetch_bucket_size`, DeepSpeed keeps more, and this is the most.
    """
    width = 2 if bf16 else 4
    used = samples.forwards * sum(samples.each)
    if stage == 0:
        return Traffic(reduced=width * samples.union)
    if stage == 1:
        return Traffic(gathered=width * full, reduced=width * samples.union)
    if stage == 2:
        return Traffic(gathered=width * full, reduced=width * used)
    kept = reuse_distance // (3 if recomputed else 2)
    again = samples.forwards * sum(max(0, size - kept) for size in samples.each)
    return Traffic(gathered=width * (used + again), scattered=width * used)
