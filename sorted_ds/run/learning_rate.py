"""Computes the learning rate of a step as a pure function of the step's number.

In: a step, the number of steps of the run, and the settings of the optimizer. Out: the learning rate of that step.
"""

import math

from sorted_ds.run.config import Optim


def lr_at(step: int, num_steps: int, optim: Optim) -> float:
    """Returns the learning rate of a step; step 0 is the first update.

    It grows linearly during the first `warmup_steps` and reaches its peak at the last one of them. Then it falls to
    `final_fraction` of the peak at the last step of the run, in the last `decay_steps` steps if these are set.
    """
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    if optim.decay == "constant":
        return optim.learning_rate
    peak = max(optim.warmup_steps, num_steps - 1 - optim.decay_steps) if optim.decay_steps else optim.warmup_steps
    progress = max(0, step - peak) / max(1, num_steps - 1 - peak)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if optim.decay == "cosine" else 1 - progress
    return optim.learning_rate * (optim.final_fraction + (1 - optim.final_fraction) * remaining)
