"""Prints the time of one micro-batch of each sub-network, as a multiple of its extracted plain model's: `make bench`.

Two gloo ranks, fp32. Forward, backward and reduction, in turns with the extracted model under plain DeepSpeed with the
same settings, in one run: each round times one after the other, and the ratio is the round's. Median of the rounds with
a 95 % interval (order statistics of the binomial). The optimizer step, full size at every draw, is left out. The last
row, the full network, is sorted_ds against plain DeepSpeed on the model that it is. `--stages 0 2 3 --rounds 40`.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from sorted_ds.config import Optim
from sorted_ds.engine import Engine
from sorted_ds.engine.modes import complete
from sorted_ds.loss import SummedLoss
from sorted_ds.nested import NestedModel, extract, nest
from sorted_ds.space import SubNetSpace
from tests.spawn import on_ranks

SPACE = SubNetSpace.grid(depths=[2, 4, 8], groups=[1, 2, 4], ffn=[192, 384, 768])
TIMED = ["d2-g1-f192", "d8-g1-f192", "d2-g4-f768", "d4-g2-f384", "d4-g4-f192", "d8-g2-f384", "d8-g4-f384", "d8-g4-f768"]
ROWS, ROW_TOKENS, VOCAB = 4, 128, 1024
WARM_UP_ROUNDS = 3


def nested_model() -> NestedModel:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCAB,
    )
    return nest(LlamaForCausalLM(config), SPACE)


def times(ranks, stage: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Of each sub-network and round: seconds of the draw, and of the extracted model."""
    config = {"zero_optimization": {"stage": stage}}
    engine = Engine(nested_model(), config, "benchmark", Optim(), ROWS, ranks)
    engine.warm_up(ROWS, ROW_TOKENS)
    statics = {name: static(ranks, config, name) for name in TIMED}
    ids = torch.randint(VOCAB, (ROWS, ROW_TOKENS), generator=torch.Generator().manual_seed(ranks.rank))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in TIMED}
    for number in range(WARM_UP_ROUNDS + rounds):
        for name in TIMED:
            subnet, plain = SPACE[name], statics[name]
            turns = [
                lambda subnet=subnet: engine.backward(engine.forward(ids, ids, subnet) / ids.numel()),
                lambda plain=plain: plain.backward(plain(ids, ids) / ids.numel()),
            ]
            order = (0, 1) if number % 2 else (1, 0)
            seconds = {turn: timed(turns[turn]) for turn in order}
            engine.step(0.0)
            plain.step()
            if number >= WARM_UP_ROUNDS:
                found[name].append((seconds[0], seconds[1]))
    return found


def static(ranks, config: dict, name: str):
    """The extracted model under plain DeepSpeed."""
    loss = SummedLoss(extract(nested_model(), name))
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.0)
    full = copy.deepcopy(complete(config, ROWS, ranks.size, 1.0))
    return deepspeed.initialize(model=loss, optimizer=optimizer, config=full, dist_init_required=False)[0]


def timed(work: Callable[[], object]) -> float:
    """Seconds until every rank has done it."""
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median, and its 95 % interval by order statistics: no assumption on the distribution."""
    ordered, half = sorted(values), 0.98 * len(values) ** 0.5
    low, high = round(len(values) / 2 - half), round(len(values) / 2 + half)
    return ordered[len(values) // 2], ordered[max(0, low)], ordered[min(len(values) - 1, high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    for stage in args.stages:
        with tempfile.TemporaryDirectory() as folder:
            found = on_ranks(2, times, stage, args.rounds, folder=Path(folder))
        print(f"\nZeRO stage {stage}, {args.rounds} rounds\n")
        print(f"{'sub-network':13}{'draw ms':>9}{'plain ms':>10}{'ratio':>8}  95 %")
        for name, rows in found.items():
            ratio, low, high = interval([draw / plain for draw, plain in rows])
            draw, plain = (1000 * interval([row[side] for row in rows])[0] for side in (0, 1))
            print(f"{name:13}{draw:>9.1f}{plain:>10.1f}{ratio:>8.3f}  {low:.3f}-{high:.3f}", flush=True)


if __name__ == "__main__":
    main()
