"""`sorted-ds train`: checks the run file, prepares its data, and starts the ranks."""

import argparse

from rich.console import Console

from sorted_ds.launcher import launch, num_devices
from sorted_ds.resolve import check_run, prepare_data
from sorted_ds.run_file import load_run


def run(args: argparse.Namespace) -> int:
    settings = load_run(args.run_file, args.overrides)
    check_run(settings)
    console, num_ranks = Console(stderr=True, soft_wrap=True), args.ranks or num_devices() or 1
    prepare_data(settings, console)
    console.print(f"starting {num_ranks} ranks (DeepSpeed compiles its operations at the first start, a minute)")
    return launch(["sorted_ds.train", str(args.run_file), *args.overrides], num_ranks)
