"""The teacher of a run: the model from which sub-networks learn. It is the full network, another model, or none.

In: `[loss]` of a run file. Out: for each forward pass the teacher's states on the same rows, which the head of the
student compares with its own (tasks/losses.py). Another model is held whole by every rank, in the training precision
and without optimizer state: `plan` counts it. Its weights are read as those of `model.init` are.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from sorted_ds.base.errors import UserError
from sorted_ds.cluster.ranks import Ranks
from sorted_ds.data.loader import Batch
from sorted_ds.engine.modes import is_bf16
from sorted_ds.families import family_of
from sorted_ds.nested import NestedModel
from sorted_ds.nested.hf_weights import resolve_source
from sorted_ds.nested.load import build, check_weights
from sorted_ds.run.config import FULL_TEACHES, Run
from sorted_ds.run.model_config import attention_of, checkpoint_config
from sorted_ds.run.run_file import load_engine_config
from sorted_ds.space import Pass, SubNet, SubNetSpace
from sorted_ds.tasks import Task, task_of
from sorted_ds.tasks.losses import Teacher
from sorted_ds.tasks.task import Outcome

KEY = "loss.teacher"


@dataclass(frozen=True)
class Teaching:
    """Hands the states of a teacher to the passes of a step."""

    full: SubNet | None = None
    """The full network, if it teaches."""
    other: NestedModel | None = None
    """Another model that teaches."""
    task: Task | None = None

    @torch.no_grad()
    def before(self, batch: Batch) -> Teacher | None:
        """Returns the states of another model for a micro-batch, before its first pass."""
        if self.other is None:
            return None
        assert self.task is not None
        family = self.other.family
        batch = {name: value.to(self.other.device) for name, value in batch.items()}
        head = self.other.get_submodule(family.head)
        assert isinstance(head.weight, nn.Parameter)
        states = self.task.states(self.other, family, batch)
        return Teacher(states, head.weight.detach(), family.logits_rule(self.other.config))

    def for_pass(self, pass_: Pass, lesson: Teacher | None) -> Teacher | None:
        """Returns what a pass learns from. The full network does not learn from itself."""
        return lesson if pass_.has_gradient and pass_.subnet != self.full else None

    def after(self, pass_: Pass, outcome: Outcome, lesson: Teacher | None) -> Teacher | None:
        """Returns what the next pass on the same rows may learn from."""
        if pass_.subnet != self.full or outcome.states is None:
            return lesson
        return Teacher(outcome.states)


def teacher_source(run: Run, asks_hub: bool = True) -> Path | None:
    """Returns the folder of another model that teaches, on this host; None if there is none.

    Without `asks_hub` another process of this host must have downloaded it. Raises: UserError when it cannot be found.
    """
    if run.loss.teacher in ("", FULL_TEACHES):
        return None
    return resolve_source(run.loss.teacher, asks_hub)


def teacher_config(run: Run, asks_hub: bool = True) -> PreTrainedConfig | None:
    """Returns the config of another model that teaches, or None. Raises: UserError when it cannot be used."""
    source = teacher_source(run, asks_hub)
    if source is None:
        return None
    config = checkpoint_config(source, KEY)
    config._attn_implementation = attention_of(config)
    return config


def check_teacher(run: Run) -> None:
    """Checks another model that teaches, without reading its weights. Raises: UserError when it cannot be used."""
    source, config = teacher_source(run), teacher_config(run)
    if source is None or config is None:
        return
    check_weights(family_of(config.model_type), config, space_of_teacher(config), source)
    longest = getattr(config, "max_position_embeddings", run.batch.row_tokens)
    if run.batch.row_tokens > longest:
        raise UserError(
            f"batch.row_tokens = {run.batch.row_tokens}, but the max_position_embeddings of {KEY} = {run.loss.teacher} "
            f"is {longest}. Set batch.row_tokens to {longest} or less, or name another teacher."
        )
    task_of(run.task).check_teacher(run, source)


def space_of_teacher(config: PreTrainedConfig) -> SubNetSpace:
    """Returns a space that has the whole teacher alone."""
    return SubNetSpace([family_of(config.model_type).full(config)])


def load_teaching(run: Run, task: Task, space: SubNetSpace, ranks: Ranks) -> Teaching:
    """Returns whom the run's sub-networks learn from. Every rank must call this.

    Raises: UserError, on all ranks, for weights that cannot be read.
    """
    if run.loss.teacher == FULL_TEACHES:
        return Teaching(full=space.full)
    with ranks.fail_together():
        source, config = teacher_source(run, asks_hub=False), teacher_config(run, asks_hub=False)
        if source is None or config is None:
            return Teaching()
        dtype = torch.bfloat16 if is_bf16(load_engine_config(run.engine.deepspeed)) else torch.float32
        family = family_of(config.model_type)
        other = build(family, config, space_of_teacher(config), source, run.seed, dtype, ranks.device)
    return Teaching(other=other.eval().requires_grad_(False), task=task)
