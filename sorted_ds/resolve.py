"""What follows from a run file: the space, the model's config, the data's settings; and every check that needs no GPU.

In: a `Run`. Out: values that `plan`, `prepare` and `train` share, or one error that says what to change.
"""

import difflib
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoConfig, PreTrainedConfig

from sorted_ds.config import SCRATCH, TRAIN_TOKENIZER, Run
from sorted_ds.data.loader import deal
from sorted_ds.data.prepare import DataSpec, TokenizedText, prepare
from sorted_ds.data.sources import find_files
from sorted_ds.data.tokenizer import Vocabulary, load_tokenizer, trained_vocabulary, vocabulary_of
from sorted_ds.engine.modes import check_modes
from sorted_ds.errors import UserError
from sorted_ds.nested import costs_of, sorted_by_cost
from sorted_ds.nested.families import check_space, family_of
from sorted_ds.nested.load import resolve_source
from sorted_ds.run_file import load_engine_config
from sorted_ds.schedule import SubNetSchedule
from sorted_ds.space import Cost, SubNet, SubNetSpace

PROGRESS_COLUMNS = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
ROTARY_KEYS = ("rope_theta", "rope_scaling")
"""Config keys that Hugging Face takes and keeps as `rope_parameters`."""


def model_config(run: Run, vocabulary: Vocabulary) -> PreTrainedConfig:
    """The full network's config: that of `model.init`, or of `model.family` with `model.config` filled in.

    Raises: UserError for an unknown family, a key that it does not have, or a value that it refuses.
    """
    config = _scratch_config(run, vocabulary) if run.model.init == SCRATCH else _checkpoint_config(run, vocabulary)
    config._attn_implementation = run.model.attention
    longest = getattr(config, "max_position_embeddings", run.batch.row_tokens)
    if run.batch.row_tokens > longest:
        raise UserError(
            f"batch.row_tokens = {run.batch.row_tokens}, but the model's max_position_embeddings is {longest}. "
            f"Raise that in model.config, or set row_tokens to {longest} at most."
        )
    return config


def _checkpoint_config(run: Run, vocabulary: Vocabulary) -> PreTrainedConfig:
    if run.model.family or run.model.config:
        raise UserError(
            f"model.init = {run.model.init!r} brings its own config. Remove model.family and model.config, "
            f'or set model.init = "{SCRATCH}".'
        )
    config = AutoConfig.from_pretrained(resolve_source(run.model.init), local_files_only=True)
    family_of(config.model_type)
    if vocabulary.size > config.vocab_size:
        raise UserError(
            f"data.tokenizer = {run.data.tokenizer!r} has {vocabulary.size} tokens, but {run.model.init} knows "
            f"{config.vocab_size}. Remove data.tokenizer to use the checkpoint's own."
        )
    return config


def _scratch_config(run: Run, vocabulary: Vocabulary) -> PreTrainedConfig:
    family_of(run.model.family)
    known = {*AutoConfig.for_model(run.model.family).to_dict(), *ROTARY_KEYS}
    for key in run.model.config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            instead = f"Did you mean {near[0]!r}?" if near else "Remove it."
            raise UserError(f"model.config sets {key!r}, which {run.model.family}'s config does not have. {instead}")
    derived = {
        "vocab_size": vocabulary.size,
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": vocabulary.eos_id,
        "pad_token_id": None,
        "use_cache": True,
    }
    try:
        config = AutoConfig.for_model(run.model.family, **{**derived, **run.model.config})
    except (ValueError, TypeError) as error:
        raise UserError(f"model.config is refused by {run.model.family}: {str(error).splitlines()[0]}.") from error
    if vocabulary.size > config.vocab_size:
        raise UserError(
            f"model.config sets vocab_size = {config.vocab_size}, but the tokenizer has {vocabulary.size} tokens. "
            "Remove it from model.config: it follows from the tokenizer."
        )
    return config


def space_of(run: Run, config: PreTrainedConfig) -> SubNetSpace:
    """The run's space in ascending order of parameters. Raises: UserError when the model cannot hold it."""
    space = run.space
    if space.subnets and (space.depths or space.groups or space.ffn):
        raise UserError("space sets both subnets and sizes. Keep the list, or depths, groups and ffn.")
    named = SubNetSpace.of(space.subnets) if space.subnets else SubNetSpace.grid(space.depths, space.groups, space.ffn)
    check_space(named, config)
    return sorted_by_cost(named, config)


def data_spec(run: Run) -> DataSpec:
    """What defines the prepared tokens."""
    data = run.data
    return DataSpec(
        text=tuple(data.text),
        jsonl=tuple(data.jsonl),
        suffixes=tuple(data.suffixes),
        tokenizer=data.tokenizer,
        vocab_size=data.vocab_size,
        validation_fraction=data.validation_fraction,
        seed=run.seed,
    )


def prepare_data(run: Run, console: Console) -> TokenizedText:
    """The run's tokens on disk, made where they are not there yet, with a progress bar, and a line about them."""
    with Progress(*PROGRESS_COLUMNS, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("tokenizing", total=None)
        tokens = prepare(
            data_spec(run),
            run.data.cache_dir,
            run.data.workers,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(
        f"data: {len(tokens.train):,} training and {len(tokens.validation):,} validation tokens, vocabulary "
        f"{tokens.vocab_size:,}, in {tokens.tokenizer_dir.parent}",
        highlight=False,
        soft_wrap=True,
    )
    return tokens


def vocabulary(run: Run) -> Vocabulary:
    """That of the run's tokenizer; of one that is still to be trained, what it will be."""
    if run.data.tokenizer == TRAIN_TOKENIZER:
        return trained_vocabulary(run.data.vocab_size)
    return vocabulary_of(load_tokenizer(run.data.tokenizer))


def schedule_of(run: Run, costs: Mapping[SubNet, Cost]) -> SubNetSchedule:
    """The run's schedule over its sub-networks in ascending order of FLOPs."""
    ascending = sorted(costs, key=lambda subnet: (costs[subnet].flops_per_token, subnet))
    return SubNetSchedule(ascending, run.schedule.draws, run.schedule.strategy, run.seed)


def check_run(run: Run) -> tuple[PreTrainedConfig, SubNetSpace]:
    """Every check that needs neither a GPU nor tokens; returns the model's config and the space.

    Raises: UserError for the first thing that training would trip over.
    """
    config = model_config(run, vocabulary(run))
    space = space_of(run, config)
    deal(run.batch.step_rows, run.schedule.draws, run.batch.micro_batch_rows, world_size=1)
    find_files(run.data.text, run.data.jsonl, run.data.suffixes)
    for name in run.eval.subnets:
        space[name]
    check_modes(load_engine_config(run.engine.deepspeed), str(run.engine.deepspeed))
    schedule_of(run, costs_of(space, config, run.batch.row_tokens))
    return config, space
