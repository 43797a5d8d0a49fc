"""What follows from a run file: the space, the model's config, the data's settings; and every check that needs no GPU.

In: a `Run`. Out: values that `plan`, `prepare` and `train` share, or one error that says what to change.
"""

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedConfig

from sorted_ds.base.errors import UserError
from sorted_ds.data.loader import deal
from sorted_ds.data.rows import PackedRows
from sorted_ds.data.text.prepare import DataSpec, TokenizedText, prepare
from sorted_ds.data.text.sources import find_files
from sorted_ds.data.text.tokenizer import Vocabulary, load_tokenizer, trained_vocabulary, vocabulary_of
from sorted_ds.engine.modes import check_modes, is_offloaded
from sorted_ds.engine.optimizers import check_implementation
from sorted_ds.families.decoder import check_space
from sorted_ds.nested import costs_of, sorted_by_cost
from sorted_ds.run.config import TRAIN_TOKENIZER, Run
from sorted_ds.run.model_config import model_config
from sorted_ds.run.run_file import load_engine_config
from sorted_ds.space import Cost, SubNet, SubNetSpace
from sorted_ds.space.sampling import Sampler

PROGRESS_COLUMNS = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())


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
    """The run's tokens on disk, made where they are not there yet, with a progress bar, and a line about them.

    Raises: UserError when text or tokenizer cannot be used, or one side of the text is shorter than a row.
    """
    with Progress(*PROGRESS_COLUMNS, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("tokenizing", total=None)
        tokens = prepare(
            data_spec(run),
            run.data.cache_dir,
            run.data.workers,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    for side, found in (("training", tokens.train), ("validation", tokens.validation)):
        PackedRows(found, run.batch.row_tokens, side)
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


def schedule_of(run: Run, costs: Mapping[SubNet, Cost]) -> Sampler:
    """The run's schedule over its sub-networks in ascending order of FLOPs."""
    ascending = sorted(costs, key=lambda subnet: (costs[subnet].flops_per_token, subnet))
    return Sampler(ascending, run.sampling.subnets_per_step, run.sampling.strategy, run.seed)


def check_run(run: Run) -> tuple[PreTrainedConfig, SubNetSpace]:
    """Every check that needs neither a GPU nor tokens; returns the model's config and the space.

    Raises: UserError for the first thing that training would trip over.
    """
    config = model_config(run, vocabulary(run))
    space = space_of(run, config)
    deal(run.batch.step_rows, run.sampling.subnets_per_step, run.batch.micro_batch_rows, world_size=1)
    find_files(run.data.text, run.data.jsonl, run.data.suffixes)
    for name in run.eval.subnets:
        space[name]
    engine = load_engine_config(run.engine.deepspeed)
    check_modes(engine, str(run.engine.deepspeed), run.engine.compile)
    check_implementation(run.optim, is_offloaded(engine))
    schedule_of(run, costs_of(space, config, run.batch.row_tokens))
    return config, space
