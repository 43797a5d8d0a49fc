"""`Score`: what a sub-network reached in a task of lm_eval.

In: JSON of sorted.json, or results of lm_eval (harness.py). Out: immutable values, checked. Nothing here imports torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    task: str
    """The name of the task, or of a group of tasks, like `arc_easy`."""
    metric: str
    """The name that lm_eval gives it, like `acc`. The name of a filter of answers, if there is one, follows a comma."""
    value: float
    stderr: float | None
    """The standard error, None where lm_eval states none."""
    num_samples: int
    num_fewshot: int | None
    """The examples before each question. None for a group whose tasks differ in it."""
    chat: bool
    """Whether the questions were put into the tokenizer's chat template."""
    lm_eval: str
    """The version of lm_eval."""

    def __post_init__(self) -> None:
        """Raises: ValueError for a value that cannot be."""
        kinds = {"task": str, "metric": str, "num_samples": int, "chat": bool, "lm_eval": str}
        numbers = [number for number in (self.value, self.stderr) if number is not None]
        is_valid = all(isinstance(getattr(self, name), kind) for name, kind in kinds.items())
        is_valid = is_valid and isinstance(self.num_fewshot, int | None) and self.value is not None
        if not is_valid or not all(isinstance(number, int | float) and not math.isnan(number) for number in numbers):
            raise ValueError(f"a score is {asdict(self)}")

    @property
    def name(self) -> tuple[str, str]:
        """The task and the metric."""
        return self.task, self.metric

    @property
    def terms(self) -> tuple[object, ...]:
        """What the scores of two sub-networks must have in common to be compared, beside the task and the metric."""
        return self.num_samples, self.num_fewshot, self.chat, self.lm_eval

    def to_json(self) -> dict[str, Any]:
        """Returns the fields."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Score":
        """Returns the score that `to_json` wrote. Raises: TypeError for other keys, ValueError for other values."""
        return cls(**stored)


def merged_scores(
    earlier: Sequence[Score], new: Sequence[Score], terms: Mapping[str, tuple[object, ...]]
) -> tuple[Score, ...]:
    """Returns the scores of a sub-network in the order of their names. A new one replaces an earlier one.

    `terms`: by task, those of all new scores. Earlier scores of these tasks that had other terms are removed.
    """
    kept = {score.name: score for score in earlier if score.terms == terms.get(score.task, score.terms)}
    by_name = kept | {score.name: score for score in new}
    return tuple(by_name[name] for name in sorted(by_name))
