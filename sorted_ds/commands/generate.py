"""`sorted-ds generate`: writes text with a sub-network, alone or with a smaller one as its draft.

In: the directory of a trained model, and prompts. Out: the text on stdout, which appears while it is written if there
is one prompt, or JSON; and a summary on stderr.
"""

import argparse
import json
import sys
from dataclasses import asdict

import torch
from transformers import TextStreamer
from transformers.utils.logging import disable_progress_bar

from sorted_ds.base.errors import UserError
from sorted_ds.commands.eval import device_of
from sorted_ds.deploy.family import TrainedFamily, load
from sorted_ds.deploy.generate import Completion, Options, generate
from sorted_ds.deploy.speculative import Speculation

STDIN = "-"


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code. Raises: UserError for what the user can correct."""
    disable_progress_bar()
    options = Options(args.max_new_tokens, args.temperature, args.top_p, args.top_k)
    prompts = [sys.stdin.read() if prompt == STDIN else prompt for prompt in args.prompt]
    family = load(args.dir, device=device_of(args.device))
    model = _model(family, args)
    is_streamed = len(prompts) == 1 and not args.json
    streamer = TextStreamer(family.tokenizer, skip_prompt=True, skip_special_tokens=True) if is_streamed else None
    torch.manual_seed(args.seed)
    completions = generate(model, family.tokenizer, prompts, options, chat=args.chat, streamer=streamer)
    if args.json:
        print(json.dumps(_facts(args, family, model, completions)))
    elif not is_streamed:
        print("\n\n".join(completion.prompt + completion.text for completion in completions))
    print(_summary(model, completions), file=sys.stderr)
    return 0


def _model(family: TrainedFamily, args: argparse.Namespace):
    """Returns what generates. Without a draft, only the sub-network's ranges of the files are read."""
    subnet = args.subnet or family.space.full
    if args.draft is None:
        if args.draft_tokens is not None:
            raise UserError("--draft-tokens needs a draft. Name one with --draft, or leave out --draft-tokens.")
        return family.read(subnet)
    return family.speculation(subnet, args.draft, args.draft_tokens)


def _facts(args: argparse.Namespace, family: TrainedFamily, model, completions: list[Completion]) -> dict:
    facts: dict[str, object] = {
        "subnet": str(args.subnet or family.space.full),
        "completions": [asdict(completion) for completion in completions],
    }
    if isinstance(model, Speculation):
        facts["draft"] = {"subnet": args.draft, **asdict(model.counts)}
    return facts


def _summary(model, completions: list[Completion]) -> str:
    num_tokens = sum(completion.num_tokens for completion in completions)
    if not isinstance(model, Speculation):
        return f"{num_tokens} tokens"
    counts = model.counts
    return (
        f"{num_tokens} tokens in {counts.rounds} passes; {counts.accepted} of {counts.proposed} proposed tokens were "
        f"kept ({counts.acceptance:.0%})"
    )
