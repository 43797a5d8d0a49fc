"""Builds what follows from a run file: the space, the sampler, the data, and for training the model and the engine.

In: a `Run`. Out: the space and the sampler; the prepared data and this rank's rows; the model with its first weights,
and DeepSpeed's engine around it. On disk: the prepared data.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedConfig

from sorted_ds.base.errors import UserError
from sorted_ds.cluster.ranks import Ranks
from sorted_ds.data.loader import Loader, MicroBatch, Rows, validation_batches
from sorted_ds.data.mixture import JoinedRows, Mixture, Order, Shuffled
from sorted_ds.deploy.evaluate import choose_spread
from sorted_ds.engine import Engine, partitioner
from sorted_ds.engine.modes import is_bf16, stage_of
from sorted_ds.families import family_of
from sorted_ds.nested import Family, NestedModel, sorted_by_cost
from sorted_ds.nested.family import check_space
from sorted_ds.nested.hf_weights import fingerprint
from sorted_ds.nested.load import build
from sorted_ds.run.config import FULL_TEACHES, Run, SamplingBase
from sorted_ds.run.model_config import (
    layer_order_of,
    source_of,
)
from sorted_ds.run.run_file import load_engine_config
from sorted_ds.space import Cost, LossPasses, Policy, Sampler, SubNet, SubNetSpace
from sorted_ds.space.passes import exits_of
from sorted_ds.tasks import Prepared, Task, task_of
from sorted_ds.tasks.losses import Terms

PROGRESS_COLUMNS = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())


# What follows from a run file


def space_of(run: Run, family: Family, config: PreTrainedConfig) -> SubNetSpace:
    """Returns the run's space in ascending order of parameters. Raises: UserError when the model cannot hold it."""
    settings, order = run.space, layer_order_of(run) or None
    if settings.subnets and settings.sizes:
        given = ", ".join(f"space.{key}" for key in settings.sizes)
        raise UserError(f"space.subnets is set together with {given}. Remove space.subnets, or the sizes.")
    if settings.subnets:
        space = SubNetSpace.of(settings.subnets, order)
    else:
        space = SubNetSpace.grid(layer_order=order, **settings.sizes)
    check_space(space, family, config)
    return sorted_by_cost(space, family, config)


def sampler_of(run: Run, space: SubNetSpace, costs: Mapping[SubNet, Cost]) -> Sampler:
    """Returns the sampler of the run's sub-networks. It gets them in ascending order of FLOPs.

    Raises: UserError for settings of `[sampling]` or `[loss]` that the space does not fit.
    """
    ascending = sorted(costs, key=lambda subnet: (costs[subnet].flops_per_token, subnet))
    phases = {step: policy_of(settings, space, costs) for step, settings in run.sampling.phases_by_step.items()}
    if run.loss.exit_rate < 1 and not run.loss.exit_weight:
        raise UserError(
            f"loss.exit_rate = {run.loss.exit_rate:g} needs loss.exit_weight, which is 0. Set loss.exit_weight, or "
            "remove loss.exit_rate."
        )
    exit_rate = run.loss.exit_rate if run.loss.exit_weight else 0.0
    loss = LossPasses(run.loss.teacher == FULL_TEACHES, exit_rate, run.loss.layer_dropout)
    if exit_rate and not any(exits_of(subnet, space) for subnet in space):
        raise UserError(
            f"loss.exit_weight = {run.loss.exit_weight:g}, but no sub-network of the space begins with the layers of a "
            "shallower one that has its widths. Remove loss.exit_weight, space.layer_order, or change the space."
        )
    return Sampler(ascending, policy_of(run.sampling, space, costs), run.seed, phases, loss, space)


def policy_of(settings: SamplingBase, space: SubNetSpace, costs: Mapping[SubNet, Cost]) -> Policy:
    """Returns the policy of a phase. Raises: UserError for a sub-network that is not in the space."""
    sampled = [named_in(space, name, "sampling.ladder") for name in settings.ladder] or list(space)
    factors = {named_in(space, name, "sampling.weights"): factor for name, factor in settings.weights.items()}
    largest = costs[space.full].flops_per_token
    weights = {
        subnet: factors.get(subnet, 1.0) * (costs[subnet].flops_per_token / largest) ** settings.cost_power
        for subnet in sampled
    }
    are_set = settings.ladder or settings.weights or settings.cost_power
    return Policy(
        settings.subnets_per_step,
        settings.strategy,
        settings.full_shares,
        settings.subnets_per_share,
        settings.hold_steps,
        weights if are_set else {},
    )


def named_in(space: SubNetSpace, name: str, key: str) -> SubNet:
    """Returns the sub-network that a key of the run file names. Raises: UserError if it is not in the space."""
    try:
        return space[name]
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


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
    rows, validation = (
        task.rows(data, run.batch.row_tokens, is_validation, run.batch.isolate) for is_validation in (False, True)
    )
    lines = [f"data: {task.summary(data)}, in {data.folder}", *task.notes(data), *shares_of(run, order_of(run, rows))]
    if len(validation) < run.eval.rows:
        lines.append(
            f"warning: validation has {len(validation):,} rows, fewer than eval.rows = {run.eval.rows}, so losses are "
            "less certain. Raise data.validation_fraction, or use more text."
        )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return data


def training_loader(run: Run, task: Task, data: Prepared, ranks: Ranks) -> Loader:
    """Returns the loader of this rank's rows."""
    rows = task.rows(data, run.batch.row_tokens, is_validation=False, isolate=run.batch.isolate)
    return Loader(
        rows,
        partial(task.collate, row_tokens=run.batch.row_tokens),
        run.seed,
        run.batch.step_rows,
        run.batch.micro_batch_rows,
        ranks.rank,
        ranks.size,
        order_of(run, rows),
    )


def order_of(run: Run, rows: Rows) -> Order:
    """Returns which training row is where: shuffled, and for a mixture by its weights."""
    if not isinstance(rows, JoinedRows):
        return Shuffled(len(rows), run.seed)
    num_rows = {name: len(own) for name, own in rows.sources.items()}
    return Mixture(num_rows, run.data.weights_by_step, run.seed, run.batch.step_rows)


def shares_of(run: Run, order: Order) -> list[str]:
    """Returns a line for each source of a mixture: how many rows of the run are from it, and how often it is read."""
    if not isinstance(order, Mixture):
        return []
    total = run.train.steps * run.batch.step_rows
    return [
        f"{name}: {number:,} of the run's {total:,} rows ({number / total:.1%}), which is {number / size:.2f} epochs"
        for (name, number), size in zip(order.rows_of(run.train.steps).items(), order.num_rows.values(), strict=True)
    ]


def validation_of(run: Run, task: Task, data: Prepared, ranks: Ranks) -> list[MicroBatch]:
    """Returns this rank's validation rows."""
    rows = task.rows(data, run.batch.row_tokens, is_validation=True, isolate=run.batch.isolate)
    num_rows, micro_batch_rows = min(run.eval.rows, len(rows)), run.batch.micro_batch_rows
    collate = partial(task.collate, row_tokens=run.batch.row_tokens)
    return list(validation_batches(rows, collate, num_rows, micro_batch_rows, ranks.rank, ranks.size))


def eval_subnets(run: Run, space: SubNetSpace) -> list[SubNet]:
    """Returns the sub-networks that are evaluated during training. The full network is always one of them."""
    if not run.eval.subnets:
        return choose_spread(space)
    return sorted({space[name] for name in run.eval.subnets} | {space.full}, key=space.index)


# Model and engine


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
    weights = ""
    with ranks.fail_together():
        source = source_of(run)
        if source is not None and ranks.local_rank == 0:  # one rank of each host
            weights = fingerprint(source)
    weights_of_first = ranks.gather(weights)[0]
    ranks.require_same_facts({f"the weights of {init}": weights or weights_of_first})
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
    rows, compiles = run.batch.micro_batch_rows, run.engine.compile
    return Engine(model, task, config, where, run.optim, rows, ranks, compiles, terms_of(run))


def terms_of(run: Run) -> Terms | None:
    """Returns the weights of the loss, or None if it has no term beside that of the labels."""
    loss = run.loss
    if not loss.teacher and not loss.exit_weight:
        return None
    return Terms(loss.teacher_weight, loss.temperature, loss.exit_weight)
