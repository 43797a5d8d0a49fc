"""`sorted-ds sort`: puts the important units of a pre-trained model first, and finds an order of its layers.

In: a Hugging Face directory and text. On disk: the sorted model in OUT. Out: a table of losses before and after.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from sorted_ds.base.errors import UserError
from sorted_ds.deploy.table import console, numbers_table
from sorted_ds.nested.hf_weights import resolve_source
from sorted_ds.run.build import prepare_data
from sorted_ds.run.config import Batch, Data, Engine, Model, Run, Space, Train
from sorted_ds.run.model_config import model_config
from sorted_ds.run.sorting import Loads, Report, sort_model
from sorted_ds.tasks import task_of

VALIDATION_FRACTION = 0.2
ROW_TOKENS = 256
"""The default length of a row, unless the model takes fewer tokens."""
FLAGS = {
    "batch.row_tokens": "--row-tokens",
    "data.text": "--text",
    "data.files": "--files",
    "data.suffixes": "--suffixes",
    " (relative to the run file)": "",
    " (data.fields names the field)": "",
    "Set data.fields to one of them.": "Rename one of them.",
}
"""What messages say of a run file, and what the user of this command has set instead."""


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code. Raises: UserError for what the user can correct."""
    disable_progress_bar()
    if args.out.exists():
        raise UserError(f"{args.out} already exists. Name another --out, or delete it.")
    with tempfile.TemporaryDirectory() as cache:
        try:
            report = sort(args, Path(cache))
        except UserError as error:
            raise UserError(in_own_words(str(error))) from error
    if args.json:
        print(json.dumps(asdict(report)))
    else:
        show(report, args.out)
    return 0


def in_own_words(message: str) -> str:
    """Returns a message with this command's flags in place of the keys of a run file."""
    for key, flag in FLAGS.items():
        message = message.replace(key, flag)
    return message


def sort(args: argparse.Namespace, cache: Path) -> Report:
    source = resolve_source(args.model)
    longest = model_config(settings_of(source, args, cache, row_tokens=1)).max_position_embeddings
    settings = settings_of(source, args, cache, args.row_tokens or min(ROW_TOKENS, longest))
    config = model_config(settings)
    data = prepare_data(settings, Console(stderr=True))
    loads = Loads(args.tokens, args.order_tokens, fewest_layers=args.fewest_layers)
    return sort_model(source, config, task_of(settings.task), data, settings.batch.row_tokens, args.out, loads)


def settings_of(source: Path, args: argparse.Namespace, cache: Path, row_tokens: int) -> Run:
    """Returns the settings of a run that has this model and text."""
    return Run(
        model=Model(init=str(source)),
        space=Space(),
        data=Data(
            text=args.text,
            files=args.files,
            suffixes=args.suffixes,
            tokenizer=str(source),
            validation_fraction=VALIDATION_FRACTION,
            cache_dir=cache,
        ),
        batch=Batch(step_rows=1, micro_batch_rows=1, row_tokens=row_tokens),
        train=Train(steps=1),
        engine=Engine(deepspeed=Path("unused")),
    )


def show(report: Report, out: Path) -> None:
    """Prints the tables."""
    table = numbers_table("sub-network", "before", "sorted", "sorted, layer order")
    for name, *losses in zip(report.subnets, report.before, report.after, report.ordered, strict=True):
        table.add_row(name, *(f"{loss:.4f}" for loss in losses))
    out_console = console()
    out_console.print("loss in nats on text that importance was not measured on:")
    out_console.print(table)
    depths = numbers_table("layers", "loss", "left out")
    num_layers = len(report.layer_order)
    for depth, loss in sorted(report.losses_by_depth.items(), reverse=True):
        depths.add_row(str(depth), f"{loss:.4f}", str(report.layer_order[depth]) if depth < num_layers else "")
    out_console.print("layer order, one layer left out after the other:")
    out_console.print(depths)
    for axis, layers in report.importance.items():
        half = [sum(shares[: -(-len(shares) // 2)]) for shares in layers.values()]
        out_console.print(
            f"the more important half of {axis} has {min(half):.0%} to {max(half):.0%} of the importance of a layer"
        )
    out_console.print(f'written to {out}; take the order with space.layer_order = "model"')
