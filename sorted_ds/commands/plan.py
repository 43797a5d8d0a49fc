"""`sorted-ds plan`: checks a run file, and prints what the run will do and cost.

In: a run file and a number of ranks. Out: tables and sentences on stdout, or the numbers as JSON. Nothing is on disk.
"""

import argparse
import json
from dataclasses import asdict

from sorted_ds.cluster.launcher import num_devices
from sorted_ds.deploy.table import console
from sorted_ds.run.checks import check_run
from sorted_ds.run.plan import make_plan
from sorted_ds.run.plan_text import checkpoint_line, compute_lines, plan_table, stage_line, stage_table, step_lines
from sorted_ds.run.run_file import load_run


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code. Raises: UserError for what the user can correct."""
    settings = load_run(args.run_file, args.overrides)
    config, space = check_run(settings)
    plan = make_plan(settings, space, config, args.ranks or num_devices() or 1)
    if args.json:
        print(json.dumps(asdict(plan)))
        return 0
    out = console()
    out.print(plan_table(plan), "", *step_lines(plan), "", *compute_lines(plan, args.tflops), sep="\n", soft_wrap=True)
    out.print("", stage_line(plan), "", stage_table(plan), sep="\n", soft_wrap=True)
    out.print("", checkpoint_line(plan, settings.checkpoint.asynchronous), sep="\n", soft_wrap=True)
    for warning in plan.warnings:
        out.print(f"\nwarning: {warning}", style="yellow", soft_wrap=True)
    return 0
