"""Tasks say what a network is trained for: its loss and metrics, its micro-batches, and how its data is prepared."""

from sorted_ds.base.errors import UserError
from sorted_ds.tasks.causal_lm import CausalLM
from sorted_ds.tasks.task import LOSS, Baseline, Metric, Prepared, SummedLoss, Task

__all__ = ["LOSS", "TASKS", "Baseline", "Metric", "Prepared", "SummedLoss", "Task", "task_of"]

TASKS: dict[str, Task] = {"causal_lm": CausalLM()}
"""The tasks by the name that a run file gives them."""


def task_of(name: str) -> Task:
    """Returns the task of this name. Raises: UserError for an unknown name."""
    if name not in TASKS:
        raise UserError(f"task = {name!r} is not known. Known: {', '.join(TASKS)}.")
    return TASKS[name]
