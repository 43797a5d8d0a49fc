"""Scores sub-networks in the tasks of lm_eval, EleutherAI's evaluation harness, without exporting them.

In: a trained family, and names of tasks or files that define some. Out: `Score`s by sub-network. On disk: the table in
sorted.json and subnets.json. lm_eval chooses the questions, runs each sub-network's view, and computes the metrics. It
comes with the extra `eval`.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from sorted_ds.base.errors import UserError, reason_of
from sorted_ds.base.extras import needed
from sorted_ds.deploy.family import TrainedFamily
from sorted_ds.deploy.model_dir import Measured
from sorted_ds.deploy.score import Score
from sorted_ds.space import SubNet

ROWS = 16
"""The rows of one forward pass. Scores do not depend on it beyond rounding."""
STDERR = "_stderr"
NO_FILTER = "none"


@dataclass(frozen=True)
class Tasks:
    """What is run. The fields are named as lm_eval's own options."""

    names: tuple[str, ...]
    """Tasks, groups of tasks or tags that lm_eval knows, or YAML files that define them."""
    include_path: Path | None = None
    """A folder of further YAML files."""
    limit: int | None = None
    """The number of questions of each task; None for all."""
    num_fewshot: int | None = None
    """The number of examples before each question; None for what the task says."""
    apply_chat_template: bool = False


class Harness:
    """lm_eval with its tasks loaded, and what it can say about one family."""

    def __init__(self, family: TrainedFamily, tasks: Tasks):
        """Loads the tasks' data.

        Raises: UserError for another model than a causal one, an unknown task, or data that cannot be read.
        """
        if family.architecture.auto_class is not AutoModelForCausalLM:
            kind = family.config.model_type
            raise UserError(f"--tasks runs causal language models, and {kind} is none. Leave out --tasks.")
        if tasks.apply_chat_template and not family.tokenizer.chat_template:
            raise UserError(f"the tokenizer of {family.where.model} has no chat template. Leave out the option for it.")
        self.family, self.tasks = family, tasks
        self.lm_eval, self._models = _module("lm_eval"), _module("lm_eval.models.huggingface")
        with self._naming_tasks():
            self._manager = _module("lm_eval.tasks").TaskManager(
                include_path=tasks.include_path and str(tasks.include_path)
            )
            loaded = self._manager.load(list(tasks.names))
        inside = {child for children in loaded.get("group_map", {}).values() for child in children}
        self.shown = tuple(name for name in (*loaded.get("groups", ()), *loaded["tasks"]) if name not in inside)
        """The tasks that were asked for: a group stands for those in it."""

    def scores(self, model: PreTrainedModel) -> tuple[Score, ...]:
        """Returns the scores of a plain model. Raises: UserError when lm_eval cannot run the tasks."""
        tasks = self.tasks
        with self._naming_tasks(), _quiet():
            found = self.lm_eval.simple_evaluate(
                self._models.HFLM(pretrained=model, tokenizer=self.family.tokenizer, batch_size=ROWS),
                tasks=list(tasks.names),
                limit=tasks.limit,
                num_fewshot=tasks.num_fewshot,
                apply_chat_template=tasks.apply_chat_template,
                task_manager=self._manager,
                log_samples=False,
            )
        return tuple(scores_of(found, tasks.apply_chat_template, self.lm_eval.__version__))

    @contextlib.contextmanager
    def _naming_tasks(self) -> Iterator[None]:
        """Turns what lm_eval raises into one line. It raises many types, and those of `datasets`."""
        try:
            yield
        except Exception as error:
            names = ", ".join(self.tasks.names)
            raise UserError(
                f"lm_eval cannot run {names}: {reason_of(error)}. Correct --tasks; `lm_eval ls tasks` lists what "
                "it knows, and --include-path names a folder of more."
            ) from error


def score_family(
    harness: Harness, subnets: Sequence[SubNet], report: Callable[[str], None] = lambda name: None
) -> tuple[Measured, ...]:
    """Scores sub-networks that are in the table, and adds the scores to it after each one. Returns the table.

    `report`: called with the name of each sub-network before it runs. Raises: UserError when lm_eval cannot run a task.
    """
    family = harness.family
    for subnet in subnets:
        report(subnet.name)
        family.where.add_scores({subnet.name: harness.scores(family[subnet])})
    return family.table


def scores_of(found: Mapping[str, Any], chat: bool, version: str) -> Iterator[Score]:
    """Yields the metrics in the results of lm_eval, of groups too. Their keys are like `acc,none`."""
    for task, results in found["results"].items():
        for key, value in results.items():
            metric, _, chosen = key.partition(",")
            if not chosen or not isinstance(value, int | float) or metric.endswith(STDERR):
                continue
            stderr = results.get(f"{metric}{STDERR},{chosen}")
            yield Score(
                task=task,
                metric=metric if chosen == NO_FILTER else key,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                num_samples=_num_samples(found, task),
                num_fewshot=found["n-shot"].get(task),
                chat=chat,
                lm_eval=version,
            )


def _num_samples(found: Mapping[str, Any], task: str) -> int:
    """Returns the number of questions of a task, or of all tasks of a group."""
    counts, children = found["n-samples"], found.get("group_subtasks", {}).get(task, ())
    return counts[task]["effective"] if task in counts else sum(_num_samples(found, child) for child in children)


def _module(name: str) -> ModuleType:
    return needed(name, "eval", "--tasks")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the warnings of lm_eval, which loading the tasks has shown, and its progress bars in a job's log."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        if sys.stderr.isatty():
            yield
        else:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                yield
    finally:
        logger.setLevel(level)
