"""`sorted-ds prepare`: a run's text into tokens on disk."""

import argparse
import json

from rich.console import Console

from sorted_ds.run.resolve import prepare_data
from sorted_ds.run.run_file import load_run


def run(args: argparse.Namespace) -> int:
    tokens = prepare_data(load_run(args.run_file, args.overrides), Console(stderr=True))
    if args.json:
        found = {
            "tokens_dir": str(tokens.tokenizer_dir.parent),
            "tokenizer_dir": str(tokens.tokenizer_dir),
            "vocab_size": tokens.vocab_size,
            "train_tokens": len(tokens.train),
            "validation_tokens": len(tokens.validation),
            "unigram_nats": tokens.unigram_nats,
        }
        print(json.dumps(found))
    return 0
