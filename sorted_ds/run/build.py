"""Builds what follows from a run file: the space, the sampler, the data, and for training the model and the engine.

In: a `Run`. Out: values that `plan`, `prepare` and `train` share, or one error that says what to change; then the model
with its first weights, DeepSpeed's engine around it, and this rank's rows. On disk: the prepared data.
"""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedConfig

from sorted_ds.base.errors import UserError
from sorted_ds.checkpoint.branch import CHECKPOINTS_FOLDER, Origin
from sorted_ds.checkpoint.folders import published_checkpoints
from sorted_ds.checkpoint.index import DamagedError, Index
from sorted_ds.cluster.ranks import Ranks
from sorted_ds.cluster.stop import time_limit_seconds
from sorted_ds.data.loader import Loader, MicroBatch, Rows, deal, validation_batches
from sorted_ds.data.mixture import JoinedRows, Mixture, Order, Pattern, Shuffled
from sorted_ds.deploy.evaluate import choose_spread
from sorted_ds.engine import Engine, partitioner
from sorted_ds.engine.modes import check_modes, is_bf16, is_offloaded, stage_of
from sorted_ds.engine.optimizers import check_implementation
from sorted_ds.families import family_of
from sorted_ds.nested import Family, NestedModel, costs_of, sorted_by_cost
from sorted_ds.nested.family import check_space
from sorted_ds.nested.hf_weights import fingerprint, unread_weight_files
from sorted_ds.nested.load import build, check_weights, generation_config_of
from sorted_ds.run.config import FULL_TEACHES, Run, SamplingBase
from sorted_ds.run.data_config import Data, DataFiles
from sorted_ds.run.model_config import (
    config_of_json,
    json_of_config,
    layer_order_of,
    model_config,
    sorted_source,
    source_of,
)
from sorted_ds.run.run_dir import identity_of, require_step
from sorted_ds.run.run_file import load_engine_config
from sorted_ds.run.teacher import check_teacher
from sorted_ds.space import Cost, LossPasses, Policy, Sampler, SubNet, SubNetSpace
from sorted_ds.space.passes import exits_of
from sorted_ds.tasks import Prepared, Task, task_of
from sorted_ds.tasks.losses import Terms

LARGEST_RATE = 0.1
"""With a larger learning rate for AdamW the user is warned."""
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


def check_run(run: Run) -> tuple[PreTrainedConfig, SubNetSpace]:
    """Checks all that needs neither a GPU nor tokens. Returns the full network's config and the space.

    Raises: UserError for the first setting that training could not use.
    """
    task = task_of(run.task)
    config = model_config(run)
    family = family_of(config.model_type)
    space = space_of(run, family, config)
    if source := source_of(run):
        check_weights(family, config, space, source)
    check_steps(run)
    check_writable(run.run_dir, "run_dir")
    check_writable(run.data.cache_dir, "data.cache_dir")
    sampler = sampler_of(run, space, costs_of(space, family, config, run.batch.row_tokens))
    for phase in sampler.phases:
        deal(run.batch.step_rows, phase.num_shares, run.batch.micro_batch_rows, world_size=1)
    check_teacher(run)
    task.check_data(run)
    for name in run.eval.subnets:
        named_in(space, name, "eval.subnets")
    engine = load_engine_config(run.engine.deepspeed)
    check_modes(engine, str(run.engine.deepspeed), run.engine.compile)
    check_implementation(run.optim, is_offloaded(engine))
    check_resumable(run, config)
    return config, space


def check_once(run: Run, ranks: Ranks) -> tuple[PreTrainedConfig, SubNetSpace]:
    """Like `check_run`, but rank 0 alone reads the data's folders, the tokenizer and the headers of the weights.

    Every rank must call this. Raises: AgreedError, on all ranks.
    """
    config = config_of_json(run, ranks.ask_first(lambda: json_of_config(check_run(run)[0])))
    return config, space_of(run, family_of(config.model_type), config)


def warnings_of(run: Run, config: PreTrainedConfig) -> list[str]:
    """Returns what the user should know before a run: weight files that are not read, and doubtful settings."""
    source = source_of(run)
    found = task_of(run.task).warnings(run, config, None if source is None else generation_config_of(source))
    if unread := [] if source is None else unread_weight_files(source):
        found.append(f"{source} holds weights that are not read: {', '.join(unread)}")
    if run.optim.warmup_steps >= run.train.steps:
        found.append(
            f"optim.warmup_steps = {run.optim.warmup_steps}, but train.steps = {run.train.steps}, so the learning rate "
            f"never reaches its peak. Set optim.warmup_steps below {run.train.steps}."
        )
    if run.optim.learning_rate * run.optim.weight_decay >= 1:
        found.append(
            f"optim.learning_rate = {run.optim.learning_rate:g} times optim.weight_decay = {run.optim.weight_decay:g} "
            "is 1 or more, so a step takes weights beyond zero. Lower one of them."
        )
    if run.optim.name == "adamw" and run.optim.learning_rate > LARGEST_RATE:
        found.append(
            f"optim.learning_rate = {run.optim.learning_rate:g} is very large for AdamW, where 1e-5 to 1e-2 are usual."
        )
    return found


def check_steps(run: Run) -> None:
    """Raises UserError for a time limit that cannot be read, and for steps to skip that are not in the run."""
    if run.train.time_limit:
        time_limit_seconds(run.train.time_limit)
    skipped, last = set(run.train.skip_steps), run.train.steps - 1
    if beyond := sorted(step for step in skipped if step > last):
        raise UserError(
            f"train.skip_steps = {run.train.skip_steps} names step {beyond[0]}, but the last step is {last}. Remove it."
        )
    for key, phases in (("sampling.phases", run.sampling.phases), ("data.phases", run.data.phases)):
        if late := [phase.from_step for phase in phases if phase.from_step > last]:
            raise UserError(f"{key} has from_step = {late[0]}, but the last step is {last}. Remove that phase.")
    check_mixture(run.data)
    if late_kept := [step for step in run.checkpoint.keep_steps if step > run.train.steps]:
        raise UserError(
            f"checkpoint.keep_steps names step {late_kept[0]}, but the run ends after {run.train.steps}. Remove it."
        )
    if run.optim.decay_steps and run.optim.decay == "constant":
        raise UserError(
            f'optim.decay_steps = {run.optim.decay_steps}, but optim.decay = "constant". Remove one of them.'
        )
    if len(skipped) > last:
        raise UserError(f"train.skip_steps leaves none of train.steps = {run.train.steps} steps. Remove one.")


def check_mixture(data: Data) -> None:
    """Raises UserError for sources and phases of a mixture that do not fit together."""
    names = [source.name for source in data.sources]
    alone = [key for key, field in DataFiles.model_fields.items() if getattr(data, key) != field.default]
    if names and alone:
        raise UserError(
            f"data.sources are set together with data.{alone[0]}. Move {', '.join(alone)} into a table of data.sources."
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"data.sources has two sources with the name {twice[0]!r}. Rename one.")
    if len({phase.from_step for phase in data.phases}) < len(data.phases):
        raise UserError("data.phases has two phases with one from_step. Join them.")
    for phase in data.phases:
        if unknown := [name for name in phase.weights if name not in names]:
            raise UserError(f"data.phases has a weight for {unknown[0]!r}, but data.sources has {', '.join(names)}.")
    for step, weights in data.weights_by_step.items() if names else ():
        if not any(weights):
            raise UserError(f"data.phases leaves no source from step {step} on. Give one a weight above 0.")
        Pattern(weights)


def check_writable(folder: Path, key: str) -> None:
    """Raises UserError if a folder, or the nearest one above it that exists, cannot be written. Leaves nothing.

    `key`: the key of the run file that names the folder.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(f"{key} = {folder} cannot be written ({error.strerror}). Set another {key}.") from error


def check_resumable(run: Run, config: PreTrainedConfig) -> None:
    """Raises UserError if RUN_DIR has checkpoints of another run, or the run cannot branch off from another one.

    A damaged checkpoint in RUN_DIR is the matter of training.
    """
    folder = run.run_dir / CHECKPOINTS_FOLDER
    published = published_checkpoints(folder)
    if published and run.model.sort and not sorted_source(run):
        raise UserError(
            f"{folder} has checkpoints, but the sorted model that they began with is not in {run.run_dir}. Run "
            "`sorted-ds prepare` with this run file, which sorts it again."
        )
    if run.checkpoint.branch and not published:
        index = Origin.parse(run.checkpoint.branch).index(identity_of(run, config, data_key=""))
        require_step(index.step, run.train.steps, folder)
    for checkpoint in published[-1:]:
        with suppress(DamagedError):
            index = Index.read(checkpoint)
            require_step(index.step, run.train.steps, folder)
            # The data is not prepared yet, so its key is taken to be the same.
            identity_of(run, config, index.identity.get("data", "")).check(index.identity, folder)


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
    rows = task.rows(data, run.batch.row_tokens, is_validation=False, isolate=run.batch.isolate)
    lines = (f"data: {task.summary(data)}, in {data.folder}", *task.notes(data), *shares_of(run, order_of(run, rows)))
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
