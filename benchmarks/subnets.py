"""Forward, backward and reduction of one micro-batch of each sub-network, against its extracted plain model.

Both end in sorted_ds's loss (`SummedLoss`), so that a ratio tells what nesting costs and nothing else: the plain model
runs under plain DeepSpeed with the same settings. Timed is the reduction too with which a step begins at stages 0 and 1
(later ones reduce in the backward pass), but not the update after it, which is of the full size whatever was sampled,
nor the zeros that it needs for what was not active.
"""

import random
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import (
    Setting,
    costs,
    engine_of,
    interval,
    nested_llama,
    now,
    plain_deepspeed,
    speed,
    timed,
    token_ids,
    training_tflops,
)
from sorted_ds.nested import extract
from sorted_ds.run.config import Optim
from sorted_ds.space import Pass, SubNet
from tests.batches import batch, summed
from tests.spawn import on_ranks

QUARTERS = [(1, 1, 1), (4, 1, 1), (1, 4, 4), (2, 2, 2), (2, 4, 1), (4, 2, 2), (4, 4, 2), (4, 4, 4)]
"""Quarters of depth, groups and ffn; the last is the full network."""
WARM_UP_ROUNDS = 2
FLUSHED = 2**25
"""Elements that are written before each turn: what ran before it, a large network's update or a small one's, is out of
the caches then."""

Times = dict[SubNet, list[tuple[float, float]]]


class Timed:
    """A DeepSpeed engine whose micro-batches are timed, each with a step after it."""

    def __init__(self, deepspeed_engine, ranks, setting: Setting):
        self.of, self.device, self.began, self.in_step = (ranks, setting), ranks.device, 0.0, 0.0
        self.reduces_in_step = setting.stage <= 1
        optimizer = deepspeed_engine.optimizer
        if setting.stage == 1 and not setting.bf16:
            self._watch(optimizer, "reduce_gradients", begins=True)
            self._watch(optimizer, "reduce_ipg_grads", ends=True)  # the last call is the last bucket's
        elif setting.stage <= 1:
            self._watch(deepspeed_engine, "_reduce_non_expert_gradients", begins=True, ends=True)

    def _watch(self, owner: object, name: str, begins: bool = False, ends: bool = False) -> None:
        """The reduction begins before this method of DeepSpeed's, or ends after it."""
        method = getattr(owner, name)

        def watched(*args, **kwargs) -> None:
            if begins:
                self.began = now(*self.of)
            method(*args, **kwargs)
            if ends:
                self.in_step = now(*self.of) - self.began

        setattr(owner, name, watched)

    def micro_batch(self, passes: Callable[[], object], step: Callable[[], object]) -> float:
        """Seconds of its passes, and of its reduction."""
        torch.zeros(FLUSHED, device=self.device)
        seconds, self.in_step = timed(passes, *self.of), 0.0
        step()
        assert (self.in_step > 0.0) == self.reduces_in_step, "DeepSpeed reduces where nobody looks"
        return seconds + self.in_step


def times(ranks, setting: Setting, num_rounds: int) -> Times:
    """For each sub-network and round: its seconds in the engine, and those of its extracted model."""
    size = setting.size
    subnets = [size.of(*quarters) for quarters in QUARTERS]
    model = nested_llama(size, dtype=setting.dtype, device=ranks.device)
    plain = {s: plain_deepspeed(summed(extract(model, s)), setting, ranks) for s in subnets}
    engine = engine_of(model, setting, Optim(name="sgd"), ranks)
    ids = token_ids(size, ranks)
    of_nested = Timed(engine.deepspeed, ranks, setting)
    of_plain = {subnet: Timed(plain[subnet], ranks, setting) for subnet in subnets}

    def nested(subnet: SubNet) -> float:
        return of_nested.micro_batch(
            lambda: engine.backward(engine.forward(batch(ids, ids), Pass(subnet)).loss / ids.numel()),
            lambda: engine.step(0.0),
        )

    def extracted(subnet: SubNet) -> float:
        its = plain[subnet]
        return of_plain[subnet].micro_batch(lambda: its.backward(its(**batch(ids, ids)) / ids.numel()), its.step)

    found: Times = {subnet: [] for subnet in subnets}
    order = random.Random(0)  # the same on every rank
    for number in range(WARM_UP_ROUNDS + num_rounds):
        for subnet in order.sample(subnets, len(subnets)):
            seconds = {turn: turn(subnet) for turn in order.sample([nested, extracted], 2)}
            if number >= WARM_UP_ROUNDS:
                found[subnet].append((seconds[nested], seconds[extracted]))
    return found


def print_table(args: Namespace, setting: Setting) -> None:
    with tempfile.TemporaryDirectory() as folder:
        call = (args.ranks, times, setting, args.rounds)
        found = on_ranks(*call, folder=Path(folder), device=args.device, hang_seconds=args.hang_seconds)
    cost = costs(setting.size)
    print(f"\n(b) ZeRO stage {setting.stage}: a micro-batch of each sub-network against its extracted model\n")
    print(f"{'sub-network':15}{'ours ms':>9}{'plain ms':>10}  ratio (95 %)")
    for subnet, rows in found.items():
        ours, plain = (interval([row[side] for row in rows]).median for side in (0, 1))
        told = speed(training_tflops(cost[subnet], setting.size.tokens, ours), args.peak_tflops)
        ratio = interval([own / its for own, its in rows])
        print(f"{subnet.name:15}{ours * 1e3:>9.1f}{plain * 1e3:>10.1f}  {ratio}  {told}", flush=True)
