"""Compares decoding with and without drafts, and with transformers' own: `python -m benchmarks.decoding speed DIR`.

`speed` prints tokens a second of each draft, length and batch, as a ratio to plain decoding in the same run: everything
runs in turns, a ratio is taken within a round, and the median of the rounds is printed. transformers' assisted
generation takes one row only; `early exit` is its draft of the target's own first layers, without a cache that is kept.
`identity` counts the prompts whose text is token by token that of the target alone, and the margin of the choices where
it is not: the difference of the two tokens' logits in plain decoding. The results are kept in a file, so it can be
stopped and goes on. Greedy decoding; the prompts are parts of the family's validation rows.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.kept import append_rows, read_rows
from sorted_ds.deploy.evaluate import data_folder
from sorted_ds.deploy.family import TrainedFamily, load
from sorted_ds.deploy.generation.generate import padded
from sorted_ds.deploy.generation.speculative import Counts, Speculation
from sorted_ds.tasks import task_of

PROMPT_TOKENS = (8, 32)
"""The fewest and the most tokens of a prompt."""
OURS, ASSISTANT, EARLY_EXIT = "ours", "assistant_model", "early exit"
Batch = tuple[Tensor, Tensor]
"""Token ids and their mask, both [rows, columns]."""


def prompts(family: TrainedFamily, number: int) -> list[list[int]]:
    """Returns token ids: the beginnings of the validation rows, and then of later parts of them."""
    task = task_of(family.contents.task)
    data = task.open_prepared(data_folder(family.where, family.contents.data))
    rows = task.rows(data, family.contents.row_tokens, is_validation=True)
    longest = PROMPT_TOKENS[1]
    parts = [(row, first) for first in range(0, family.contents.row_tokens, longest) for row in range(len(rows))]
    if number > len(parts):
        raise SystemExit(f"the validation rows hold {len(parts)} prompts. Ask for at most so many.")
    lengths = random.Random(0)
    return [
        [int(token) for token in rows[row].ids[first : first + lengths.randint(*PROMPT_TOKENS)]]
        for row, first in parts[:number]
    ]


def batches(rows: list[list[int]], size: int, device: torch.device) -> Iterator[Batch]:
    for first in range(0, len(rows), size):
        yield padded(rows[first : first + size], 0, device)


def settings(args: argparse.Namespace) -> dict:
    return {"max_new_tokens": args.new_tokens, "do_sample": False, "pad_token_id": 0}


def assisted(family: TrainedFamily, target: PreTrainedModel, method: str, draft: str, length: int) -> dict:
    """Returns the arguments with which transformers drafts."""
    if method == EARLY_EXIT:
        target.generation_config.num_assistant_tokens = length
        target.generation_config.num_assistant_tokens_schedule = "constant"
        target.generation_config.assistant_confidence_threshold = 0.0
        return {"assistant_early_exit": family.space[draft].depth}
    helper = family[draft]
    helper.generation_config.num_assistant_tokens = length
    helper.generation_config.num_assistant_tokens_schedule = "constant"
    helper.generation_config.assistant_confidence_threshold = 0.0
    return {"assistant_model": helper}


def seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def speed(args: argparse.Namespace) -> None:
    family = load(args.dir, device=args.device, dtype=getattr(torch, args.dtype))
    subnet = args.subnet or family.space.full.name
    target = family[subnet]
    target.generation_config.eos_token_id = None  # so that every row has as many tokens
    given = settings(args)
    print(f"{subnet}, {args.new_tokens} new tokens, {args.dtype} on {args.device}, {args.rounds} rounds\n")
    print("| rows | method | draft | length | acceptance | tokens a row and pass | tokens/s / plain |")
    print("|---:|---|---|---:|---:|---:|---:|")
    for size in args.batches:
        rows = prompts(family, size * args.rounds)
        calls: dict[tuple, Callable] = {
            ("plain", "", 0): lambda ids, mask: target.generate(ids, attention_mask=mask, **given)
        }
        totals: dict[tuple, Counts] = {}
        for draft in args.drafts:
            for length in args.lengths:
                key = (OURS, draft, length)
                made = family.speculation(subnet, draft, length or None)
                made.draft.target.generation_config.eos_token_id = None
                calls[key] = partial(counted, made, totals.setdefault(key, Counts()), given)
                for method in (ASSISTANT, EARLY_EXIT) if size == 1 and length else ():
                    if (
                        method == EARLY_EXIT
                        and family.space[draft].replace(d=family.space[subnet].depth).name != subnet
                    ):
                        continue
                    calls[method, draft, length] = lambda ids, mask, key=(method, draft, length): target.generate(
                        ids, attention_mask=mask, **given, **assisted(family, target, *key)
                    )
        times = in_turns(calls, list(batches(rows, size, target.device)), target.device)
        for key, ratios in ratios_of(times).items():
            counts = totals.get(key)
            accepted = f"{counts.acceptance:.0%}" if counts else ""
            a_pass = f"{1 + counts.accepted / counts.rounds / size:.2f}" if counts else ""
            length = key[2] or ("follows" if key[0] == OURS else "")
            print(f"| {size} | {key[0]} | {key[1]} | {length} | {accepted} | {a_pass} | {ratios} |", flush=True)


def counted(made: Speculation, totals: Counts, given: dict, ids: Tensor, mask: Tensor) -> None:
    """Generates, and adds what was done to the totals."""
    made.generate(ids, attention_mask=mask, **given)
    totals.rounds += made.counts.rounds
    totals.proposed += made.counts.proposed
    totals.accepted += made.counts.accepted


def in_turns(calls: dict[tuple, Callable], inputs: list[Batch], device: torch.device) -> dict[tuple, list[float]]:
    """Returns the seconds of each call, on each batch. Everything runs once before."""
    times: dict[tuple, list[float]] = {key: [] for key in calls}
    for call in calls.values():
        call(*inputs[0])
    order = random.Random(0)
    for batch in inputs:
        for key in order.sample(list(calls), len(calls)):
            times[key].append(seconds(lambda key=key, batch=batch: calls[key](*batch), device))
    return times


def ratios_of(times: dict[tuple, list[float]]) -> dict[tuple, str]:
    """Returns the median of the speeds as ratios to plain decoding, and the smallest and largest ratio."""
    plain = next(iter(times.values()))
    texts = {}
    for key, values in times.items():
        ratios = [base / value for base, value in zip(plain, values, strict=True)]
        texts[key] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    return texts


def identity(args: argparse.Namespace) -> None:
    family = load(args.dir, device=args.device, dtype=getattr(torch, args.dtype))
    subnet = args.subnet or family.space.full.name
    made_by = {name: version(name) for name in ("torch", "transformers")}
    made_by |= {"dir": str(args.dir), "subnet": subnet, "dtype": args.dtype, "new_tokens": str(args.new_tokens)}
    if args.anew:
        args.out.unlink(missing_ok=True)
    known = {(row["method"], row["draft"], row["rows"], row["first"]) for row in read_rows(args.out, made_by)}
    target, given, ids = family[subnet], settings(args), prompts(family, args.prompts)
    speculations = {draft: family.speculation(subnet, draft) for draft in args.drafts}
    for size in args.batches:
        keys = [(OURS, draft) for draft in args.drafts]
        keys += [(ASSISTANT, draft) for draft in args.drafts] if size == 1 else []
        for number, (inputs, mask) in enumerate(batches(ids, size, target.device)):
            first = number * size
            missing = [key for key in keys if (*key, size, first) not in known]
            if not missing:
                continue
            plain = target.generate(inputs, attention_mask=mask, **given)
            for method, draft in missing:
                if method == OURS:
                    found = speculations[draft].generate(inputs, attention_mask=mask, **given)
                else:
                    helper = assisted(family, target, method, draft, 4)
                    found = target.generate(inputs, attention_mask=mask, **given, **helper)
                margins = margins_of(target, inputs, mask, plain, found)
                key = {"method": method, "draft": draft, "rows": size, "first": first}
                append_rows(args.out, [{**key, "prompts": len(inputs), "margins": margins}])
    summarize(read_rows(args.out, made_by))


@torch.no_grad()
def margins_of(target: PreTrainedModel, inputs: Tensor, mask: Tensor, plain: Tensor, found: Tensor) -> list[float]:
    """Returns, for each row that differs, how far apart the logits of the two tokens are where it first differs."""
    width, margins = inputs.shape[1], []
    columns = min(plain.shape[1], found.shape[1])
    for row in range(len(inputs)):
        differs = (plain[row, :columns] != found[row, :columns]).nonzero()
        if len(differs):
            end = int(differs[0])
            start = width - int(mask[row].sum())
            logits = target(plain[row : row + 1, start:end], logits_to_keep=1).logits[0, -1].float()
            margins.append(float((logits[plain[row, end]] - logits[found[row, end]]).abs()))
    return margins


def summarize(rows: list[dict]) -> None:
    print("| rows | method | draft | prompts | same | other | largest margin of the others |")
    print("|---:|---|---|---:|---:|---:|---:|")
    for key in sorted({(row["rows"], row["method"], row["draft"]) for row in rows}):
        own = [row for row in rows if (row["rows"], row["method"], row["draft"]) == key]
        number, margins = sum(row["prompts"] for row in own), [margin for row in own for margin in row["margins"]]
        largest = f"{max(margins):.2g}" if margins else ""
        print(
            f"| {key[0]} | {key[1]} | {key[2]} | {number:,} | {number - len(margins):,} | {len(margins)} | {largest} |"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    for name, run in (("speed", speed), ("identity", identity)):
        mode = modes.add_parser(name)
        mode.set_defaults(run=run)
        mode.add_argument("dir", type=Path, help="the directory of a trained family")
        mode.add_argument("--subnet", help="the target (default: the full network)")
        mode.add_argument("--drafts", nargs="+", required=True, help="names of sub-networks")
        mode.add_argument("--batches", nargs="+", type=int, default=[1, 4], help="numbers of rows (default: 1 4)")
        mode.add_argument("--new-tokens", type=int, default=32, help="tokens for each prompt (default: 32)")
        mode.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
        mode.add_argument("--device", default="cpu")
    modes.choices["speed"].add_argument("--lengths", nargs="+", type=int, default=[0, 2, 4, 8], help="0 follows")
    modes.choices["speed"].add_argument("--rounds", type=int, default=5, help="batches (default: 5)")
    modes.choices["identity"].add_argument("--prompts", type=int, default=1000, help="number (default: 1000)")
    modes.choices["identity"].add_argument("--out", type=Path, default=Path("build/identity.jsonl"))
    modes.choices["identity"].add_argument("--anew", action="store_true", help="delete the results of earlier starts")
    return parser.parse_args()


if __name__ == "__main__":
    args = arguments()
    args.run(args)
