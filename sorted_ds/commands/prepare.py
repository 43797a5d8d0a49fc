"""`sorted-ds prepare`: prepares the data of a run, and with `model.sort` its model.

In: a run file. On disk: the prepared data in a folder of `data.cache_dir`, and the sorted model in RUN_DIR/sorted. Out:
a summary, or facts as JSON.
"""

import argparse
import json

from rich.console import Console

from sorted_ds.run.run_file import load_run
from sorted_ds.run.sorting import prepare
from sorted_ds.tasks import task_of


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code. Raises: UserError for what the user can correct."""
    settings = load_run(args.run_file, args.overrides)
    data = prepare(settings, Console(stderr=True, soft_wrap=True))
    if args.json:
        print(json.dumps(task_of(settings.task).describe(data)))
    return 0
