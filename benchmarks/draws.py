"""Forward, backward and reduction of one micro-batch of each sub-network, against its extracted plain model.

Both end in sorted_ds's loss (`SummedLoss`), so that a ratio tells what nesting costs and nothing else: the plain model
runs under plain DeepSpeed with the same settings. Optimizer steps, full size at every draw, are taken but not timed.
"""

import random
import tempfile
from argparse import Namespace
from pathlib import Path

from benchmarks.common import (
    Setting,
    costs,
    engine_of,
    interval,
    nested_llama,
    plain_deepspeed,
    speed,
    timed,
    token_ids,
    training_tflops,
)
from sorted_ds.config import Optim
from sorted_ds.loss import SummedLoss
from sorted_ds.nested import extract
from sorted_ds.space import SubNet
from tests.spawn import on_ranks

QUARTERS = [(1, 1, 1), (4, 1, 1), (1, 4, 4), (2, 2, 2), (2, 4, 1), (4, 2, 2), (4, 4, 2), (4, 4, 4)]
"""Of depth, groups and ffn; the last is the full network."""
WARM_UP_ROUNDS = 2

Times = dict[SubNet, list[tuple[float, float]]]


def times(ranks, setting: Setting, num_rounds: int) -> Times:
    """Of each sub-network and round: seconds of the draw, and of the extracted model."""
    size = setting.size
    subnets = [size.of(*quarters) for quarters in QUARTERS]
    model = nested_llama(size, dtype=setting.dtype, device=ranks.device)
    plain = {s: plain_deepspeed(SummedLoss(extract(model, s)), setting, ranks) for s in subnets}
    engine = engine_of(model, setting, Optim(name="sgd"), ranks)
    ids = token_ids(size, ranks)

    def draw(subnet: SubNet) -> None:
        engine.backward(engine.forward(ids, ids, subnet) / ids.numel())

    def extracted(subnet: SubNet) -> None:
        plain[subnet].backward(plain[subnet](ids, ids) / ids.numel())

    found: Times = {subnet: [] for subnet in subnets}
    order = random.Random(0)  # the same on every rank
    for number in range(WARM_UP_ROUNDS + num_rounds):
        for subnet in order.sample(subnets, len(subnets)):
            turns = order.sample([draw, extracted], 2)
            seconds = {turn: timed(lambda turn=turn, subnet=subnet: turn(subnet), ranks, setting) for turn in turns}
            engine.step(0.0)
            plain[subnet].step()
            if number >= WARM_UP_ROUNDS:
                found[subnet].append((seconds[draw], seconds[extracted]))
    return found


def print_table(args: Namespace, setting: Setting) -> None:
    with tempfile.TemporaryDirectory() as folder:
        call = (args.ranks, times, setting, args.rounds)
        found = on_ranks(*call, folder=Path(folder), device=args.device, hang_seconds=args.hang_seconds)
    cost = costs(setting.size)
    print(f"\n(b) ZeRO stage {setting.stage}: a micro-batch of each sub-network against its extracted model\n")
    print(f"{'sub-network':15}{'draw ms':>9}{'plain ms':>10}  ratio (95 %)")
    for subnet, rows in found.items():
        draw, plain = (interval([row[side] for row in rows]).median for side in (0, 1))
        told = speed(training_tflops(cost[subnet], setting.size.tokens, draw), args.peak_tflops)
        ratio = interval([draw / plain for draw, plain in rows])
        print(f"{subnet.name:15}{draw * 1e3:>9.1f}{plain * 1e3:>10.1f}  {ratio}  {told}", flush=True)
