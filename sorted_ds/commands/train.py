"""`sorted-ds train`: checks the run file, prepares its data, and starts the ranks."""

import argparse

from rich.console import Console

from sorted_ds.config import load_run
from sorted_ds.launcher import launch, num_devices
from sorted_ds.resolve import check_run, prepare_data


def run(args: argparse.Namespace) -> int:
    settings = load_run(args.run_file, args.overrides)
    check_run(settings)
    prepare_data(settings, Console(stderr=True))
    return launch(["sorted_ds.train", str(args.run_file), *args.overrides], args.ranks or num_devices() or 1)
