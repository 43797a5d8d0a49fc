"""What follows from a run file: its task, space, config and data; and what training builds from them.

In: a `Run`. Out: values that `plan`, `prepare` and `train` share, or one error that says what to change; then the model
with its first weights, DeepSpeed's engine around it, and this rank's rows.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedConfig

from sorted_ds.base.errors import UserError
from sorted_ds.cluster.ranks import Ranks
from sorted_ds.data.loader import Collate, Loader, MicroBatch, deal, validation_batches
from sorted_ds.deploy.evaluate import choose_spread
from sorted_ds.engine import Engine, partitioner
from sorted_ds.engine.modes import check_modes, is_bf16, is_offloaded, stage_of
from sorted_ds.engine.optimizers import check_implementation
from sorted_ds.families import family_of
from sorted_ds.nested import Family, NestedModel, costs_of, sorted_by_cost
from sorted_ds.nested.family import check_space
from sorted_ds.nested.hf_weights import fingerprint, resolve_source
from sorted_ds.nested.load import build
from sorted_ds.run.config import SCRATCH, Run
from sorted_ds.run.model_config import model_config
from sorted_ds.run.run_file import load_engine_config
from sorted_ds.space import Cost, Sampler, SubNet, SubNetSpace
from sorted_ds.tasks import Prepared, Task, task_of

PROGRESS_COLUMNS = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())


# What follows from a run file


def space_of(run: Run, family: Family, config: PreTrainedConfig) -> SubNetSpace:
    """The run's space in ascending order of parameters. Raises: UserError when the model cannot hold it."""
    space, order = run.space, run.space.layer_order or None
    if space.subnets and space.sizes:
        raise UserError("space sets both subnets and sizes. Keep the list, or the sizes along each axis.")
    named = (
        SubNetSpace.of(space.subnets, order) if space.subnets else SubNetSpace.grid(layer_order=order, **space.sizes)
    )
    check_space(named, family, config)
    return sorted_by_cost(named, family, config)


def sampler_of(run: Run, costs: Mapping[SubNet, Cost]) -> Sampler:
    """What samples the run's sub-networks, which it gets in ascending order of FLOPs."""
    ascending = sorted(costs, key=lambda subnet: (costs[subnet].flops_per_token, subnet))
    return Sampler(ascending, run.sampling.subnets_per_step, run.sampling.strategy, run.seed)


def check_run(run: Run) -> tuple[PreTrainedConfig, SubNetSpace]:
    """Makes every check that needs neither a GPU nor tokens; returns the model's config and the space.

    Raises: UserError for the first thing that training would trip over.
    """
    task = task_of(run.task)
    config = model_config(run)
    family = family_of(config.model_type)
    space = space_of(run, family, config)
    sampler = sampler_of(run, costs_of(space, family, config, run.batch.row_tokens))
    deal(run.batch.step_rows, sampler.num_shares, run.batch.micro_batch_rows, world_size=1)
    task.check_data(run)
    for name in run.eval.subnets:
        space[name]
    engine = load_engine_config(run.engine.deepspeed)
    check_modes(engine, str(run.engine.deepspeed), run.engine.compile)
    check_implementation(run.optim, is_offloaded(engine))
    return config, space


# Data


def prepare_data(run: Run, console: Console) -> Prepared:
    """The run's data on disk, made where it is not there yet, with a progress bar, and a line about it.

    Raises: UserError when the data or its tokenizer cannot be used, or one side of it is shorter than a row.
    """
    task = task_of(run.task)
    with Progress(*PROGRESS_COLUMNS, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("preparing data", total=None)
        data = task.prepare(run, lambda done, total: progress.update(bar, completed=done, total=total))
    console.print(f"data: {task.summary(data)}, in {data.folder}", highlight=False, soft_wrap=True)
    return data


def collate_of(run: Run, task: Task) -> Collate:
    """Makes the task's micro-batches of rows of the run's length."""

    def collate(rows: Sequence, size: int) -> MicroBatch:
        return task.collate(rows, size, run.batch.row_tokens)

    return collate


def training_loader(run: Run, task: Task, data: Prepared, num_shares: int, ranks: Ranks) -> Loader:
    """This rank's rows of any step."""
    rows, batch = task.rows(data, run.batch.row_tokens, is_validation=False), run.batch
    how = (batch.step_rows, num_shares, batch.micro_batch_rows, ranks.rank, ranks.size)
    return Loader(rows, collate_of(run, task), run.seed, *how)


def validation_of(run: Run, task: Task, data: Prepared, ranks: Ranks) -> list[MicroBatch]:
    """This rank's validation rows."""
    rows = task.rows(data, run.batch.row_tokens, is_validation=True)
    num_rows, each = min(run.eval.rows, len(rows)), run.batch.micro_batch_rows
    return list(validation_batches(rows, collate_of(run, task), num_rows, each, ranks.rank, ranks.size))


def eval_subnets(run: Run, space: SubNetSpace) -> list[SubNet]:
    """The sub-networks that are evaluated during training; the full network is always one of them."""
    named = {space[name] for name in run.eval.subnets} | {space.full}
    return sorted(named, key=space.index) if run.eval.subnets else choose_spread(space)


# Model and engine


def source_of(run: Run) -> Path | None:
    """Where the first weights lie, on this host: downloaded where they are not. None for random ones.

    Raises: UserError when they are nowhere.
    """
    return None if run.model.init == SCRATCH else resolve_source(run.model.init)


def load_model(
    run: Run, config: PreTrainedConfig, space: SubNetSpace, ranks: Ranks, heartbeat: Callable[[], None] = lambda: None
) -> NestedModel:
    """The nested model with its first weights, in the training precision. A collective.

    Under ZeRO-3 each rank keeps its part of a parameter as soon as it is filled, and never holds the model.
    `heartbeat` is called for each.

    Raises: UserError, on all ranks, for weights that cannot be read or that ranks see differently.
    """
    engine, init = load_engine_config(run.engine.deepspeed), run.model.init
    zero3 = stage_of(engine) == 3
    partition = partitioner(engine, run.batch.micro_batch_rows, run.optim.clip_norm, ranks) if zero3 else None
    with ranks.fail_together():
        source = source_of(run)
        weights = "" if source is None else fingerprint(source)
    ranks.require_same_facts({f"the weights of {init}": weights})
    with ranks.fail_together():
        dtype = torch.bfloat16 if is_bf16(engine) else torch.float32
        family = family_of(config.model_type)
        model = build(family, config, space, source, run.seed, dtype, ranks.device, partition, heartbeat)
    if run.model.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def engine_of(run: Run, task: Task, model: NestedModel, ranks: Ranks) -> Engine:
    """DeepSpeed's engine around the model. A collective."""
    config, where = load_engine_config(run.engine.deepspeed), str(run.engine.deepspeed)
    return Engine(model, task, config, where, run.optim, run.batch.micro_batch_rows, ranks, run.engine.compile)
