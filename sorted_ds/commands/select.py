"""`sorted-ds select`: prints the best measured sub-network within a budget.

In: the directory of a measured model, and one or two budgets. Out: the name on stdout, and the reason on stderr.
"""

import argparse
import json
import sys

from sorted_ds.deploy.model_dir import ModelDir
from sorted_ds.deploy.select import parse_amount, reason, select


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code. Raises: UserError for what the user can correct."""
    budgets = [parse_amount(text) if text else None for text in (args.max_params, args.max_flops)]
    table = ModelDir.find(args.dir).table()
    selected = select(table, *budgets)
    print(reason(selected, table), file=sys.stderr)
    print(json.dumps(selected.to_json()) if args.json else selected.subnet)
    return 0
