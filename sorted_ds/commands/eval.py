"""`sorted-ds eval`: measures sub-networks, prints the table, and writes it with its figure.

In: the directory of a trained model. Out: the table on stdout. With --measure, also times and memory on the device at
hand. With --tasks, also scores in the tasks of lm_eval. On disk: subnets.json, pareto.png and model/sorted.json.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
from rich.console import Console
from rich.progress import Progress

from sorted_ds.base.errors import UserError
from sorted_ds.deploy.evaluate import evaluate_family
from sorted_ds.deploy.family import TrainedFamily, load
from sorted_ds.deploy.harness import Harness, Tasks, score_family
from sorted_ds.deploy.measure import measure_family, num_runs, settings_of
from sorted_ds.deploy.model_dir import PARETO_PNG, SUBNETS_JSON, Sorted
from sorted_ds.deploy.speed import Setting
from sorted_ds.deploy.table import console, measured_table, score_table, speed_table
from sorted_ds.space import SubNet
from sorted_ds.tasks import task_of


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code. Raises: UserError for what the user can correct."""
    _check_options(args)
    family = load(args.dir, device=device_of(args.device))
    names = [name.strip() for name in args.subnets.split(",")] if args.subnets else None
    subnets = [family.find(name) for name in names] if names else _all(family)
    settings = settings_of(family, args.batch or (1,), args.context or ()) if args.measure else []
    harness = Harness(family, _tasks(args)) if args.tasks else None
    _evaluate(family, _to_evaluate(family, subnets, args), args.rows)
    if settings:
        _measure(family, subnets, settings)
    if harness is not None:
        _score(harness, subnets)
    contents = family.where.read()
    if args.json:
        print(json.dumps(_json(contents)))
        return 0
    _print(contents, settings, harness.shown if harness is not None else ())
    print(f"\nWritten: {family.where.root / SUBNETS_JSON}, {family.where.root / PARETO_PNG}", file=sys.stderr)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Raises: UserError for options that would have no effect."""
    if not args.measure and (args.batch or args.context):
        raise UserError("--batch and --context say what --measure measures. Add --measure.")
    if not args.tasks and (args.include_path or args.limit or args.num_fewshot is not None or args.apply_chat_template):
        raise UserError(
            "--include-path, --limit, --num-fewshot and --apply-chat-template say how --tasks are run. Add --tasks."
        )


def _tasks(args: argparse.Namespace) -> Tasks:
    return Tasks(
        names=tuple(name.strip() for name in args.tasks.split(",")),
        include_path=args.include_path,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        apply_chat_template=args.apply_chat_template,
    )


def _all(family: TrainedFamily) -> list[SubNet]:
    """Returns the trained sub-networks, and those of the table that were never trained, ascending in parameters."""
    known = {*family.contents.space, *(row.subnet for row in family.contents.subnets)}
    return [subnet for subnet in family.cuttable if subnet.name in known]


def _to_evaluate(family: TrainedFamily, subnets: list[SubNet], args: argparse.Namespace) -> list[SubNet]:
    """Returns those whose losses are measured: with --measure or --tasks alone, those that have none in the table."""
    if not (args.measure or args.tasks) or args.rows:
        return subnets
    known = {row.subnet for row in family.contents.subnets}
    return [subnet for subnet in subnets if subnet.name not in known]


def _evaluate(family: TrainedFamily, subnets: list[SubNet], rows: int | None) -> None:
    if subnets:
        with progress("evaluating", len(subnets)) as report:
            evaluate_family(family, subnets, rows, report)


def _measure(family: TrainedFamily, subnets: list[SubNet], settings: list[Setting]) -> None:
    with progress("measuring", num_runs(len(subnets), settings)) as report:
        measure_family(family, subnets, settings, report)


def _score(harness: Harness, subnets: list[SubNet]) -> None:
    with progress("scoring", len(subnets)) as report:
        score_family(harness, subnets, report)


def _json(contents: Sorted) -> dict[str, object]:
    where = {} if contents.measured_on is None else {"measured_on": asdict(contents.measured_on)}
    return {"measured": [row.to_json() for row in contents.subnets], "baseline": contents.baseline, **where}


def _print(contents: Sorted, settings: list[Setting], tasks: Sequence[str]) -> None:
    """Prints the table, one of speeds for each setting that was measured now, and one of scores for each task."""
    out, metrics = console(), task_of(contents.task).metrics
    out.print(measured_table(contents.subnets, metrics, contents.baseline))
    for setting in settings:
        out.print()
        out.print(speed_table(contents.subnets, setting))
    for task in tasks:
        out.print()
        out.print(score_table(contents.subnets, task))
    if contents.measured_on is not None:
        out.print(f"\nSpeeds are measured on {contents.measured_on}.", soft_wrap=True)


@contextmanager
def progress(work: str, total: int) -> Iterator[Callable[[str], None]]:
    """Shows progress on stderr: as a bar on a terminal, otherwise as a line whenever what is reported changes."""
    stderr, last = Console(stderr=True), ""
    with Progress(console=stderr, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(work, total=total, start=True)

        def report(what: str) -> None:
            nonlocal last
            if stderr.is_terminal:
                bar.update(task, advance=1, description=f"{work} {what}")
            elif what != last:
                print(f"{work} {what}", file=sys.stderr)
            last = what

        yield report


def device_of(name: str | None) -> torch.device:
    """Returns the named device, or a GPU if there is one. Raises: UserError for a device that does not exist."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device. Write cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name} does not exist: this machine has {torch.cuda.device_count()} GPUs. Write cpu."
        )
    return device
