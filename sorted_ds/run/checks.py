"""Checks what a run file asks for, before anything is trained: one error that says what to change, and warnings.

In: a `Run`. Out: the config of the full network and the space, which `plan`, `prepare` and `train` share.
"""

import tempfile
from contextlib import suppress
from pathlib import Path

from transformers import PreTrainedConfig

from sorted_ds.base.errors import UserError
from sorted_ds.checkpoint.branch import CHECKPOINTS_FOLDER, Origin
from sorted_ds.checkpoint.folders import published_checkpoints
from sorted_ds.checkpoint.index import DamagedError, Index
from sorted_ds.cluster.ranks import Ranks
from sorted_ds.cluster.stop import time_limit_seconds
from sorted_ds.data.loader import deal
from sorted_ds.data.mixture import Pattern
from sorted_ds.engine.modes import check_modes, is_offloaded
from sorted_ds.engine.optimizers import check_implementation
from sorted_ds.families import family_of
from sorted_ds.nested import costs_of
from sorted_ds.nested.hf_weights import unread_weight_files
from sorted_ds.nested.load import check_weights, generation_config_of
from sorted_ds.run.build import named_in, sampler_of, space_of
from sorted_ds.run.config import Run
from sorted_ds.run.data_config import Data, DataFiles
from sorted_ds.run.model_config import config_of_json, json_of_config, model_config, sorted_source, source_of
from sorted_ds.run.run_dir import identity_of, require_step
from sorted_ds.run.run_file import load_engine_config
from sorted_ds.run.teacher import check_teacher
from sorted_ds.space import SubNetSpace
from sorted_ds.tasks import task_of

LARGEST_RATE = 0.1
"""With a larger learning rate for AdamW the user is warned."""


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
    """Returns what `check_run` returns. Rank 0 alone reads the data's folders, the tokenizer and the weights' headers.

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

    A damaged checkpoint in RUN_DIR is left to training, which repairs or reports it.
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
