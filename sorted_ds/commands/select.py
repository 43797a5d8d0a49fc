"""`sorted-ds select`: the best measured sub-network within a budget."""

import argparse
import json
import sys

from sorted_ds.deploy.model_dir import ModelDir
from sorted_ds.deploy.select import parse_amount, reason, select


def run(args: argparse.Namespace) -> int:
    budgets = [parse_amount(text) if text else None for text in (args.max_params, args.max_flops)]
    table = ModelDir.find(args.dir).table()
    chosen = select(table, *budgets)
    print(reason(chosen, table), file=sys.stderr)
    print(json.dumps(chosen.to_json()) if args.json else chosen.subnet)
    return 0
