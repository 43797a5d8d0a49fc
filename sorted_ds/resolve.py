"""What follows from a run file: the space, the model's config, the data's settings; and every check that needs no GPU.

In: a `Run`. Out: values that `plan`, `prepare` and `train` share, or one error that says what to change.
"""

import difflib
from pathlib import Path

from rich.console import Console
from transformers import AutoConfig, PreTrainedConfig

from sorted_ds.config import Run, load_engine_config
from sorted_ds.data.loader import deal
from sorted_ds.data.prepare import DataSpec, TokenizedText, prepare
from sorted_ds.data.sources import find_files
from sorted_ds.data.tokenizer import load_tokenizer
from sorted_ds.engine.modes import check_modes
from sorted_ds.errors import UserError
from sorted_ds.nested import sorted_by_cost
from sorted_ds.nested.families import check_space, family_of
from sorted_ds.nested.load import resolve_source
from sorted_ds.space import SubNetSpace

ROTARY_KEYS = ("rope_theta", "rope_scaling")
"""Config keys that Hugging Face takes and keeps as `rope_parameters`."""


def model_config(run: Run, vocab_size: int) -> PreTrainedConfig:
    """The full network's config: that of `model.init`, or of `model.family` with `model.config` filled in.

    Raises: UserError for an unknown family, a key that it does not have, or a value that it refuses.
    """
    if run.model.init != "scratch":
        config = AutoConfig.from_pretrained(resolve_source(run.model.init), local_files_only=True)
        family_of(config.model_type)
        return config
    family_of(run.model.family)
    known = {*AutoConfig.for_model(run.model.family).to_dict(), *ROTARY_KEYS}
    for key in run.model.config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            instead = f"Did you mean {near[0]!r}?" if near else "Remove it."
            raise UserError(f"model.config sets {key!r}, which {run.model.family}'s config does not have. {instead}")
    try:
        return AutoConfig.for_model(run.model.family, **{"vocab_size": vocab_size, **run.model.config})
    except (ValueError, TypeError) as error:
        raise UserError(f"model.config is refused by {run.model.family}: {str(error).splitlines()[0]}.") from error


def space_of(run: Run, config: PreTrainedConfig) -> SubNetSpace:
    """The run's space in ascending order of parameters. Raises: UserError when the model cannot hold it."""
    space = run.space
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
    """The run's tokens on disk, made where they are not there yet, and a line about them."""
    tokens = prepare(data_spec(run), run.data.cache_dir, run.data.workers)
    console.print(
        f"data: {len(tokens.train):,} training and {len(tokens.validation):,} validation tokens, vocabulary "
        f"{tokens.vocab_size:,}, in {tokens.tokenizer_dir.parent}",
        highlight=False,
        soft_wrap=True,
    )
    return tokens


def vocab_size(run: Run) -> int:
    """That of the run's tokenizer; of one that is still to be trained, what it is asked for."""
    return run.data.vocab_size if run.data.tokenizer == "train" else len(load_tokenizer(run.data.tokenizer))


def check_run(run: Run) -> tuple[PreTrainedConfig, SubNetSpace]:
    """Every check that needs neither a GPU nor tokens; returns the model's config and the space.

    Raises: UserError for the first thing that training would trip over.
    """
    config = model_config(run, vocab_size(run))
    space = space_of(run, config)
    deal(run.batch.step_rows, run.schedule.draws, run.batch.micro_batch_rows, world_size=1)
    find_files(run.data.text, run.data.jsonl, run.data.suffixes)
    for name in run.eval.subnets:
        space[name]
    check_engine(run.engine.deepspeed)
    return config, space


def check_engine(path: Path) -> None:
    """Raises: UserError when the DeepSpeed JSON is missing, damaged, or asks for what is not proven exact."""
    check_modes(load_engine_config(path), path.name)
