"""Prints what a sub-network's first and later passes cost under ZeRO-3 in spaces of 24, 300 and 1,000 sub-networks.

The smaller spaces are parts of the larger ones, and all cut each width at the same places. One process trains them in
turns, so that they share whatever else the machine does. Every sub-network of every space is timed: at its first visit,
and again when all others have been visited. The network is tiny, so a pass costs what Python costs, per layer.
The ratios compare each sub-network with itself: its first visit with its later ones, and its later visits with those in
the space of 24. Their medians are shown with the quartiles. Memory is what visiting all sub-networks once added to this
process. `python -m benchmarks.visits --layers 16 32 80` takes an hour on one core, `--layers 16` ten minutes.
"""

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil
import torch

from benchmarks.common import Setting, Size, circumstances, engine_of, nested_llama
from sorted_ds.engine import Engine
from sorted_ds.run.config import Optim
from sorted_ds.space import Pass, SubNet, SubNetSpace
from tests.batches import batch
from tests.spawn import on_ranks

NUMBERS = (24, 300, 1000)
GROUPS, FFN_STEPS, FFN_STEP = (1, 2, 4), 22, 4
MIB = 2**20
Seconds = dict[SubNet, list[float]]


def size_of(layers: int) -> Size:
    return Size(64, FFN_STEPS * FFN_STEP, layers, heads=8, groups=GROUPS[-1], vocab=64, rows=1, row_tokens=8)


def spaces_of(layers: int) -> list[SubNetSpace]:
    """Returns spaces of random sub-networks of all sizes. Each has every width, and the full network."""
    depths, sizes = range(1, layers + 1), [FFN_STEP * step for step in range(1, FFN_STEPS + 1)]
    every = [SubNet(d=depth, g=groups, f=size) for depth in depths for groups in GROUPS for size in sizes]
    widths = [SubNet(d=layers, g=GROUPS[k % len(GROUPS)], f=size) for k, size in enumerate(sizes[:-1])]
    fixed = list(dict.fromkeys([*widths, every[-1]]))
    others = [subnet for subnet in every if subnet not in fixed]
    random.Random(layers).shuffle(others)
    ordered = [*fixed, *others]
    return [SubNetSpace.of([subnet.name for subnet in ordered[:number]]) for number in NUMBERS]


def seconds_of(engine: Engine, subnet: SubNet, ids: torch.Tensor) -> float:
    began = time.perf_counter()
    engine.backward(engine.forward(batch(ids, ids), Pass(subnet)).loss)
    return time.perf_counter() - began


def measured(ranks, layers: int, rounds: int) -> tuple[list[dict[SubNet, float]], list[Seconds], list[float]]:
    """Returns each space's first visits, its later visits, and the MiB of its traces."""
    size, spaces = size_of(layers), spaces_of(layers)
    ids = torch.zeros(size.rows, size.row_tokens, dtype=torch.int64)
    engines = [
        engine_of(nested_llama(size, space), Setting(size, stage=3), Optim(name="sgd"), ranks) for space in spaces
    ]
    for engine, space in zip(engines, spaces, strict=True):
        for _ in range(3):
            seconds_of(engine, space.full, ids)
    first, added = [], []
    for engine, space in zip(engines, spaces, strict=True):
        gc.collect()
        before = psutil.Process().memory_info().rss
        first.append({subnet: seconds_of(engine, subnet, ids) for subnet in space})
        gc.collect()
        added.append((psutil.Process().memory_info().rss - before) / MIB)
    later: list[Seconds] = [defaultdict(list) for _ in spaces]
    for number in range(rounds):
        for place, subnet in turns(spaces, random.Random(number)):
            later[place][subnet].append(seconds_of(engines[place], subnet, ids))
    return first, later, added


def turns(spaces: list[SubNetSpace], generator: random.Random) -> list[tuple[int, SubNet]]:
    """Returns visits of all spaces, spread evenly over the time. The smaller a space, the more often it is visited."""
    most, visits = max(map(len, spaces)), []
    for place, space in enumerate(spaces):
        own = [subnet for _ in range(most // len(space)) for subnet in generator.sample(list(space), len(space))]
        visits += [(number / len(own), place, subnet) for number, subnet in enumerate(own)]
    return [(place, subnet) for _, place, subnet in sorted(visits, key=lambda visit: visit[:2])]


def medians_of(visits: Seconds) -> dict[SubNet, float]:
    return {subnet: statistics.median(seconds) for subnet, seconds in visits.items()}


def ratios(above: dict[SubNet, float], below: dict[SubNet, float]) -> str:
    """Returns the median and the quartiles of the ratios of the sub-networks that both have."""
    low, median, high = statistics.quantiles([above[s] / below[s] for s in above if s in below], n=4)
    return f"{median:.3f} ({low:.3f}-{high:.3f})"


def per_layer(seconds: dict[SubNet, float]) -> str:
    return f"{statistics.median(1e3 * each / subnet.depth for subnet, each in seconds.items()):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="later visits of each sub-network of the largest space")
    args = parser.parse_args()
    print(circumstances(args.ranks, "cpu"))
    print("| layers | sub-networks | first, ms a layer | later | first / later | later / later of 24 | MiB |")
    print("|---|---|---|---|---|---|---|")
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as folder:
            call = (args.ranks, measured, layers, args.rounds)
            first, later, added = on_ranks(*call, folder=Path(folder), hang_seconds=7200)
        medians = [medians_of(visits) for visits in later]
        for number, began, usual, mib in zip(NUMBERS, first, medians, added, strict=True):
            cells = [per_layer(began), per_layer(usual), ratios(began, usual), ratios(usual, medians[0]), f"{mib:.0f}"]
            print(f"| {layers} | {number:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
