"""Prints what a view costs, for every family: `python -m benchmarks.views`.

The full network has 12 layers of hidden size 512. A view of `d8-g2-f704` is compared with the extracted model: the time
to make each, the bytes that torch allocates meanwhile, and the time of a forward pass of 256 tokens and of a decoded
token, as ratios of medians in one run. One process.
"""

import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sorted_ds import SubNetSpace, extract, nest, view
from sorted_ds.families import FAMILIES

NAME = "d8-g2-f704"
SPACE = SubNetSpace.of([NAME, "d12-g4-f1408"])
SIZES = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
ROUNDS = 7
IDS = torch.arange(256)[None]


def plain_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES), dtype=torch.float32).eval()


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def allocated(call: Callable[[], object]) -> int:
    """Returns the bytes that torch's allocator gives out during a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return sum(max(0, event.self_cpu_memory_usage) for event in profile.events())


@torch.no_grad()
def decoded(model: PreTrainedModel) -> object:
    return model.generate(IDS[:, :16], max_new_tokens=8, do_sample=False)


@torch.no_grad()
def row(family: str) -> str:
    model = plain_model(family)
    nested = nest(plain_model(family), SPACE)
    seen, own = view(model, NAME), extract(nested, NAME).eval()
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS):  # in turns, so that all share whatever else the machine does
        for name, call in (
            ("view", lambda: view(model, NAME)),
            ("extract", lambda: extract(nested, NAME)),
            ("forward of the view", lambda: seen(IDS)),
            ("forward", lambda: own(IDS)),
            ("decoding of the view", lambda: decoded(seen)),
            ("decoding", lambda: decoded(own)),
        ):
            times.setdefault(name, []).append(seconds(call))
    median = {name: statistics.median(values) for name, values in times.items()}
    copied = allocated(lambda: view(model, NAME)), allocated(lambda: extract(nested, NAME))
    cells = [
        f"{1000 * median['view']:.0f}",
        f"{1000 * median['extract']:.0f}",
        f"{copied[0]:,}",
        f"{copied[1]:,}",
        f"{median['forward of the view'] / median['forward']:.2f}",
        f"{median['decoding of the view'] / median['decoding']:.2f}",
    ]
    return f"| {family} | {' | '.join(cells)} |"


def main() -> None:
    titles = ("view, ms", "extract, ms", "view, bytes", "extract, bytes", "forward / extracted", "decoding / extracted")
    print(f"| family | {' | '.join(titles)} |")
    print("|---" * (len(titles) + 1) + "|")
    for family in FAMILIES:
        print(row(family), flush=True)


if __name__ == "__main__":
    main()
