"""`sorted-ds export`: writes one or all sub-networks as ordinary Hugging Face directories.

In: the directory of a trained model. On disk: a directory for each sub-network. Out: their paths on stdout.
"""

import argparse
import sys

from transformers.utils.logging import disable_progress_bar

from sorted_ds.deploy.export import LogitsDifferError, export
from sorted_ds.deploy.model_dir import ModelDir


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code. Raises: UserError for what the user can correct."""
    disable_progress_bar()
    names = list(ModelDir.find(args.dir).read().space) if args.all else [args.subnet]
    outs = [args.out / name for name in names] if args.all else [args.out]
    try:
        written = export(args.dir, names, outs, args.store_logits)
    except LogitsDifferError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    never = [name for name in names if name not in ModelDir.find(args.dir).read().space]
    if never:
        print(f"note: never trained, only cut: {', '.join(never)}", file=sys.stderr)
    print(*written, sep="\n")
    return 0
