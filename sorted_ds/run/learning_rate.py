"""The learning rate of a step, a pure function of its number."""

import math

from sorted_ds.run.config import Optim


def lr_at(step: int, num_steps: int, optim: Optim) -> float:
    """Linear warm-up over the first `warmup_steps`, then decay to `final_fraction` of the peak at the last step.

    Step 0 is the first update; a warm-up of n steps reaches the peak at step n - 1.
    """
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    if optim.decay == "constant":
        return optim.learning_rate
    progress = (step - optim.warmup_steps) / max(1, num_steps - 1 - optim.warmup_steps)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if optim.decay == "cosine" else 1 - progress
    return optim.learning_rate * (optim.final_fraction + (1 - optim.final_fraction) * left)
