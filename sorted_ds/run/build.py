"""Builds what follows from a run file: the space, the sampler, the data, and for training the model and the engine.

In: a `Run`. Out: values that `plan`, `prepare` and `train` share, or one error that says what to change; then the model
with its first weights, DeepSpeed's engine around it, and this rank's rows. On disk: the prepared data.
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
    """Returns the run's space in ascending order of parameters. Raises: UserError when the model cannot hold it."""
    settings, order = run.space, run.space.layer_order or None
    if settings.subnets and settings.sizes:
        given = ", ".join(f"space.{key}" for key in settings.sizes)
        raise UserError(f"space.subnets is set together with {given}. Remove space.subnets, or the sizes.")
    if settings.subnets:
        space = SubNetSpace.of(settings.subnets, order)
    else:
        space = SubNetSpace.grid(layer_order=order, **settings.sizes)
    check_space(space, family, config)
    return sorted_by_cost(space, family, config)


def sampler_of(run: Run, costs: Mapping[SubNet, Cost]) -> Sampler:
    """Returns the sampler of the run's sub-networks. It gets them in ascending order of FLOPs."""
    ascending = sorted(costs, key=lambda subnet: (costs[subnet].flops_per_token, subnet))
    return Sampler(ascending, run.sampling.subnets_per_step, run.sampling.strategy, run.seed)


def check_run(run: Run) -> tuple[PreTrainedConfig, SubNetSpace]:
    """Checks all that needs neither a GPU nor tokens. Returns the full network's config and the space.

    Raises: UserError for the first setting that training could not use.
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
    """Returns the run's prepared data. Prepares it if it is not on disk yet. Prints a progress bar and a summary.

    Raises: UserError when the data or its tokenizer cannot be used, or when the training or the validation part has no
    complete row.
    """
    task = task_of(run.task)
    with Progress(*PROGRESS_COLUMNS, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("preparing data", total=None)
        data = task.prepare(run, lambda done, total: progress.update(bar, completed=done, total=total))
    console.print(f"data: {task.summary(data)}, in {data.folder}", highlight=False, soft_wrap=True)
    return data


def collate_of(run: Run, task: Task) -> Collate:
    """Returns a function that makes micro-batches from rows of the run's length."""

    def collate(rows: Sequence, size: int) -> MicroBatch:
        return task.collate(rows, size, run.batch.row_tokens)

    return collate


def training_loader(run: Run, task: Task, data: Prepared, num_shares: int, ranks: Ranks) -> Loader:
    """Returns the loader of this rank's rows. A step's rows are cut into `num_shares` equal shares."""
    return Loader(
        task.rows(data, run.batch.row_tokens, is_validation=False),
        collate_of(run, task),
        run.seed,
        run.batch.step_rows,
        num_shares,
        run.batch.micro_batch_rows,
        ranks.rank,
        ranks.size,
    )


def validation_of(run: Run, task: Task, data: Prepared, ranks: Ranks) -> list[MicroBatch]:
    """Returns this rank's validation rows."""
    rows = task.rows(data, run.batch.row_tokens, is_validation=True)
    num_rows, micro_batch_rows = min(run.eval.rows, len(rows)), run.batch.micro_batch_rows
    return list(validation_batches(rows, collate_of(run, task), num_rows, micro_batch_rows, ranks.rank, ranks.size))


def eval_subnets(run: Run, space: SubNetSpace) -> list[SubNet]:
    """Returns the sub-networks that are evaluated during training. The full network is always one of them."""
    if not run.eval.subnets:
        return choose_spread(space)
    return sorted({space[name] for name in run.eval.subnets} | {space.full}, key=space.index)


# Model and engine


def source_of(run: Run) -> Path | None:
    """Returns the folder of the first weights on this host, after a download if needed; None for random weights.

    Raises: UserError when they cannot be found.
    """
    return None if run.model.init == SCRATCH else resolve_source(run.model.init)


def load_model(
    run: Run, config: PreTrainedConfig, space: SubNetSpace, ranks: Ranks, heartbeat: Callable[[], None] = lambda: None
) -> NestedModel:
    """Returns the nested model with its first weights, in the training precision. Every rank must call this.

    Under ZeRO-3 each rank keeps only its part of a parameter as soon as the parameter is filled, so no rank ever holds
    the whole model. `heartbeat` is called for each parameter.

    Raises: UserError, on all ranks, for weights that cannot be read, or that are not the same on every rank.
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
    """Returns DeepSpeed's engine around the model. Every rank must call this."""
    config, where = load_engine_config(run.engine.deepspeed), str(run.engine.deepspeed)
    return Engine(model, task, config, where, run.optim, run.batch.micro_batch_rows, ranks, run.engine.compile)
