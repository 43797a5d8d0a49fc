"""`sorted-ds eval`: measures sub-networks, prints the table, and writes it with its figure.

In: the directory of a trained model. Out: the table on stdout. On disk: subnets.json, pareto.png and model/sorted.json.
"""

import argparse
import json
import sys

import torch
from rich.console import Console
from rich.progress import Progress

from sorted_ds.base.errors import UserError
from sorted_ds.deploy.evaluate import Evaluation, evaluate_directory
from sorted_ds.deploy.model_dir import PARETO_PNG, SUBNETS_JSON, ModelDir
from sorted_ds.deploy.table import console, measured_table


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code. Raises: UserError for what the user can correct."""
    where = ModelDir.find(args.dir)
    names = [name.strip() for name in args.subnets.split(",")] if args.subnets else None
    evaluation = _evaluate(args, names, len(names or where.read().space))
    if args.json:
        rows = [row.to_json() for row in evaluation.measured]
        print(json.dumps({"measured": rows, "baseline": evaluation.baseline}))
        return 0
    console().print(measured_table(evaluation.measured, evaluation.metrics, evaluation.baseline))
    print(f"\nWritten: {where.root / SUBNETS_JSON}, {where.root / PARETO_PNG}", file=sys.stderr)
    return 0


def _evaluate(args: argparse.Namespace, names: list[str] | None, num_subnets: int) -> Evaluation:
    """Evaluates, and shows the progress on stderr: as a bar on a terminal, otherwise as a line for each sub-network."""
    stderr = Console(stderr=True)
    with Progress(console=stderr, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("evaluating", total=num_subnets, start=True)

        def report(name: str) -> None:
            if stderr.is_terminal:
                progress.update(task, advance=1, description=f"evaluating {name}")
            else:
                print(f"evaluating {name}", file=sys.stderr)

        return evaluate_directory(args.dir, names, args.rows, device_of(args.device), report)


def device_of(name: str | None) -> torch.device:
    """Returns the device of `--device`, by default a GPU if there is one. Raises: UserError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device. Write cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name} does not exist: this machine has {torch.cuda.device_count()} GPUs. Write cpu."
        )
    return device
