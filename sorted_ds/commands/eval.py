"""`sorted-ds eval`: measures sub-networks, prints the table, writes it and the figure."""

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
    """A progress bar on a terminal, a line for each sub-network elsewhere; both on stderr."""
    errors = Console(stderr=True)
    with Progress(console=errors, disable=not errors.is_terminal) as progress:
        task = progress.add_task("evaluating", total=num_subnets, start=True)

        def report(name: str) -> None:
            if errors.is_terminal:
                progress.update(task, advance=1, description=f"evaluating {name}")
            else:
                print(f"evaluating {name}", file=sys.stderr)

        return evaluate_directory(args.dir, names, args.rows, _device(args.device), report)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device. Write cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs. Write cpu.")
    return device
