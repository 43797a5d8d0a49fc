"""`sorted-ds select`: prints the best measured sub-network within budgets.

In: the directory of a measured model, and budgets. Out: the name on stdout, and the reason on stderr.
"""

import argparse
import json
import sys
from pathlib import Path

from sorted_ds.base.errors import UserError
from sorted_ds.deploy.model_dir import ModelDir, Sorted
from sorted_ds.deploy.select import Budgets, parse_amount, reason, select
from sorted_ds.deploy.speed import Setting


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code. Raises: UserError for what the user can correct."""
    budgets = _budgets(args)
    contents = budgets.table_in(ModelDir.find(args.dir))
    if args.any:
        contents = _with_proposed(args.dir, contents, budgets)
    selected = select(contents, budgets)
    print(reason(contents, selected, budgets), file=sys.stderr)
    print(json.dumps(selected.to_json()) if args.json else selected.subnet)
    return 0


def _with_proposed(folder: Path, contents: Sorted, budgets: Budgets) -> Sorted:
    """Returns the contents with rows of a few sub-networks that were never trained. This alone needs torch."""
    from sorted_ds.commands.eval import device_of, progress
    from sorted_ds.deploy.family import load
    from sorted_ds.deploy.mix import PROPOSED_AT_MOST, add_proposed

    with progress("evaluating", PROPOSED_AT_MOST) as report:
        return add_proposed(load(folder, device=device_of(None)), contents, budgets, report)


def _budgets(args: argparse.Namespace) -> Budgets:
    budgets = Budgets(
        max_params=parse_amount(args.max_params) if args.max_params else None,
        max_flops=parse_amount(args.max_flops) if args.max_flops else None,
        max_latency_ms=args.max_latency_ms,
        max_memory_gib=args.max_memory_gib,
        max_loss_gap=args.max_loss_gap,
        min_accuracy=args.min_accuracy,
        setting=Setting(args.batch or Setting.batch, args.context or Setting.context),
    )
    if (args.batch or args.context) and not budgets.needs_speeds:
        raise UserError("--batch and --context say for what a speed is. Add --max-latency-ms or --max-memory-gib.")
    return budgets
