"""`sorted-ds generate`: writes text with a sub-network, alone or with a smaller one as its draft.

In: the directory of a trained model, and prompts. Out: the text on stdout, which appears while it is written if there
is one prompt, or JSON; and a summary on stderr.
"""

import argparse
import json
import sys
from dataclasses import asdict

import torch
from transformers import PreTrainedModel, TextStreamer
from transformers.utils.logging import disable_progress_bar

from sorted_ds.base.errors import UserError
from sorted_ds.commands.eval import device_of
from sorted_ds.deploy.family import TrainedFamily, load
from sorted_ds.deploy.generation.choose_draft import AUTO, choose_draft
from sorted_ds.deploy.generation.generate import Completion, Options, generate
from sorted_ds.deploy.generation.speculative import Speculation

STDIN = "-"


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code. Raises: UserError for what the user can correct."""
    disable_progress_bar()
    options = Options(args.max_new_tokens, args.temperature, args.top_p, args.top_k)
    prompts = [sys.stdin.read() if prompt == STDIN else prompt for prompt in args.prompt]
    family = load(args.dir, device=device_of(args.device))
    subnet = family.find(args.subnet or family.space.full).name
    model = _model(family, subnet, prompts, options, args)
    is_streamed = len(prompts) == 1 and not args.json
    streamer = TextStreamer(family.tokenizer, skip_prompt=True, skip_special_tokens=True) if is_streamed else None
    torch.manual_seed(args.seed)
    completions = generate(model, family.tokenizer, prompts, options, chat=args.chat, streamer=streamer)
    if args.json:
        print(json.dumps(_facts(subnet, args.draft, model, completions)))
    elif not is_streamed:
        print("\n\n".join(completion.prompt + completion.text for completion in completions))
    print(_summary(model, subnet, completions), file=sys.stderr)
    return 0


def _model(
    family: TrainedFamily, subnet: str, prompts: list[str], options: Options, args: argparse.Namespace
) -> PreTrainedModel | Speculation:
    """Returns what generates. Without a draft, only the sub-network's ranges of the files are read."""
    if args.draft is None:
        if args.draft_tokens is not None:
            raise UserError("--draft-tokens needs a draft. Name one with --draft, or leave out --draft-tokens.")
        return family.read(subnet)
    if args.draft == AUTO:
        given = (family.space, family.find(subnet), family.tokenizer, prompts, options)
        choice = choose_draft(family.full, *given, draft_tokens=args.draft_tokens, chat=args.chat)
        speeds = ", ".join(f"{name} {speed:.2f}" for name, speed in choice.speeds.items())
        print(f"draft: {choice.draft or 'none'} (speeds as ratios to plain decoding: {speeds})", file=sys.stderr)
        args.draft = choice.draft
        return choice.model
    return family.speculation(subnet, args.draft, args.draft_tokens)


def _facts(subnet: str, draft: str | None, model: PreTrainedModel | Speculation, completions: list[Completion]) -> dict:
    texts = [asdict(completion) for completion in completions]
    facts: dict[str, object] = {"subnet": subnet, "completions": texts}
    if isinstance(model, Speculation):
        facts["draft"] = {"subnet": draft, **asdict(model.counts)}
    return facts


def _summary(model: PreTrainedModel | Speculation, subnet: str, completions: list[Completion]) -> str:
    num_tokens = sum(completion.num_tokens for completion in completions)
    if not isinstance(model, Speculation):
        return f"{num_tokens} tokens"
    counts = model.counts
    kept = f"{counts.accepted} of {counts.proposed} proposed tokens were kept ({counts.acceptance:.0%})"
    return f"{num_tokens} tokens in {counts.rounds} passes of {subnet}; {kept}"
