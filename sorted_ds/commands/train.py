"""`sorted-ds train`: checks the run file, prepares its data and its model, and starts the ranks on this machine.

In: a run file. Out: what the ranks print, and their exit code. On disk: the prepared data, and RUN_DIR (run/train.py).
"""

import argparse

from rich.console import Console

from sorted_ds.cluster.launcher import launch, num_devices
from sorted_ds.run.checks import check_run
from sorted_ds.run.run_file import load_run
from sorted_ds.run.sorting import prepare


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code. Raises: UserError for what the user can correct."""
    settings = load_run(args.run_file, args.overrides)
    check_run(settings)
    console, num_ranks = Console(stderr=True, soft_wrap=True), args.ranks or num_devices() or 1
    prepare(settings, console)
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    console.print(f"starting {ranks}, which takes half a minute; the first time DeepSpeed also compiles its operations")
    return launch(["sorted_ds.commands.rank", str(args.run_file), *args.overrides], num_ranks)
