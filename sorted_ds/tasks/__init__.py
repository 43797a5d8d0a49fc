"""What a network is trained for: how a forward pass becomes sums, which metrics are shown, how data is prepared."""

from sorted_ds.base.errors import UserError
from sorted_ds.tasks.causal_lm import CausalLM
from sorted_ds.tasks.task import LOSS, Baseline, Metric, Prepared, SummedLoss, Task

__all__ = ["LOSS", "TASKS", "Baseline", "Metric", "Prepared", "SummedLoss", "Task", "task_of"]

TASKS: dict[str, Task] = {"causal_lm": CausalLM()}
"""By the name that a run file gives."""


def task_of(name: str) -> Task:
    """Raises: UserError for an unknown task; it names the known ones."""
    if name not in TASKS:
        raise UserError(f"task = {name!r} is not known. Known: {', '.join(TASKS)}.")
    return TASKS[name]
