"""24, 160 and 1,000 sub-networks in the space of one model: does a step, the start or the memory grow with them?

What may grow is the number of parameters, one or a few for each width step, not that of sub-networks: the space of
1,000 has 25 feed-forward widths where that of 24 has 3. Engines of the three live in one process, and each round times
the full network and one sub-network that all three hold, in each of them and extracted under plain DeepSpeed. `step`,
which is of the full size whatever was active, is compared with that of the smallest space.
"""

import gc
import random
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from benchmarks.common import (
    Setting,
    Size,
    engine_of,
    interval,
    llama,
    nested_llama,
    plain_deepspeed,
    timed,
    token_ids,
)
from sorted_ds.engine import Engine
from sorted_ds.families import nest
from sorted_ds.nested import costs_of, extract
from sorted_ds.run.config import Optim
from sorted_ds.space import Pass, Policy, SubNet, SubNetSpace
from sorted_ds.space.sampling import STRATEGIES, Sampler
from tests.batches import TASK, batch, blank, summed
from tests.spawn import on_ranks

WARM_UP_ROUNDS = 2
VISITED = 300
"""Other sub-networks that run once, in tiny passes: more than the traces that stage 3 keeps."""
MIB = 2**20


def spaces(size: Size) -> dict[int, SubNetSpace]:
    """Returns the spaces by their number of sub-networks; each is a grid up to the full network."""
    ffn = [size.ffn * n // 25 for n in range(1, 26)]
    groups = [size.groups // 2**n for n in range(5)]
    depths = [size.layers * n // 8 for n in range(1, 9)]
    return {
        24: SubNetSpace.grid(depths=depths[1::2], groups=groups[:2], ffn=[ffn[9], ffn[19], ffn[24]]),
        160: SubNetSpace.grid(depths=depths, groups=groups[:4], ffn=ffn[4::5]),
        1000: SubNetSpace.grid(depths=depths, groups=groups, ffn=ffn),
    }


def common(size: Size) -> SubNet:
    """One that all of them hold, of half of each size, about."""
    return SubNet(d=size.layers // 2, g=size.groups // 2, f=size.ffn * 10 // 25)


@dataclass
class Found:
    """What was measured of one space."""

    num_parameters: int
    build_seconds: float
    warm_up_seconds: float
    rss_mib: float
    """That the engine added to the process, warm."""
    num_objects: int
    """Python objects that it added."""
    visited_rss_mib: float = 0.0
    visited_objects: int = 0
    """What `VISITED` sub-networks added to it."""
    ratios: dict[str, list[float]] = field(default_factory=lambda: {"full": [], "common": []})
    """Seconds of a micro-batch over those of the extracted model, by round."""
    steps: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of `step`, with the reduction that is in it at stages 0 and 1, and those with the smallest space."""


def used() -> tuple[float, int]:
    """MiB of the process, and its Python objects."""
    gc.collect()
    return psutil.Process().memory_info().rss / MIB, len(gc.get_objects())


def start(ranks, setting: Setting, space: SubNetSpace) -> tuple[Engine, Found]:
    model = llama(setting.size, setting.dtype)
    before = used()
    began = time.perf_counter()
    nested = nest(model, space).to(ranks.device)
    engine = Engine(nested, TASK, setting.engine_keys(), "benchmark", Optim(), setting.size.rows, ranks)
    built = time.perf_counter()
    engine.warm_up(blank(setting.size.rows, setting.size.row_tokens))
    warm = time.perf_counter()
    after = used()
    num_parameters = len(list(nested.parameters()))
    return engine, Found(num_parameters, built - began, warm - built, after[0] - before[0], after[1] - before[1])


def visit(engine: Engine, found: Found) -> None:
    """Runs many other sub-networks once."""
    before = used()
    space, ids = engine.model.space, torch.zeros(1, 8, dtype=torch.int64)
    for number in range(min(VISITED, len(space))):
        engine.evaluate(batch(ids, ids), space[number * len(space) // min(VISITED, len(space))])
    after = used()
    found.visited_rss_mib, found.visited_objects = after[0] - before[0], after[1] - before[1]


def times(ranks, setting: Setting, num_rounds: int) -> dict[int, Found]:
    size, ids = setting.size, token_ids(setting.size, ranks)
    holds = spaces(size)
    subnets = {"full": holds[24].full, "common": common(size)}
    model = nested_llama(size, holds[24], setting.dtype)
    plain = {k: plain_deepspeed(summed(extract(model, s)), setting, ranks) for k, s in subnets.items()}
    engine_of(model, setting, Optim(), ranks)  # what a first engine starts is not the first space's
    started = {number: start(ranks, setting, space) for number, space in holds.items()}
    for engine, found in started.values():
        visit(engine, found)
    order = random.Random(0)  # the same on every rank
    for number in range(WARM_UP_ROUNDS + num_rounds):
        for kind, subnet in subnets.items():
            turns: dict[int, Callable[[], None]] = {0: lambda kind=kind: _plain_pass(plain[kind], ids)}
            turns |= {n: lambda e=e, subnet=subnet: _pass(e, ids, subnet) for n, (e, _) in started.items()}
            seconds = {n: timed(turns[n], ranks, setting) for n in order.sample(sorted(turns), len(turns))}
            plain[kind].step()
            steps = {n: lambda e=e: e.step(0.0) for n, (e, _) in started.items()}
            in_step = {n: timed(steps[n], ranks, setting) for n in order.sample(sorted(steps), len(steps))}
            for n, (_, found) in started.items():
                found.ratios[kind] += [seconds[n] / seconds[0]] * (number >= WARM_UP_ROUNDS)
                found.steps += [(in_step[n], in_step[min(holds)])] * (number >= WARM_UP_ROUNDS)
    return {n: found for n, (_, found) in started.items()}


def _pass(engine: Engine, ids: torch.Tensor, subnet: SubNet) -> None:
    engine.backward(engine.forward(batch(ids, ids), Pass(subnet)).loss / ids.numel())


def _plain_pass(engine, ids: torch.Tensor) -> None:
    engine.backward(engine(**batch(ids, ids)) / ids.numel())


def print_table(args: Namespace, setting: Setting) -> None:
    with tempfile.TemporaryDirectory() as folder:
        call = (args.ranks, times, setting, args.rounds)
        measured = on_ranks(*call, folder=Path(folder), device=args.device, hang_seconds=args.hang_seconds)
    print(f"\n(c) ZeRO stage {setting.stage}: spaces; a micro-batch of the full network, and of {common(setting.size)}")
    print(f"as multiples of the extracted models; +{VISITED}: what as many other sub-networks added\n")
    print(f"{'sub-networks':>12}{'params':>8}{'build s':>9}{'warm-up s':>11}{'RSS MiB':>9}{'objects':>9}", end="")
    print(f"{'+MiB':>7}{'+objects':>9}  full (95 %)            one of half (95 %)     step ms, over the first's")
    for number, found in measured.items():
        row = f"{number:>12}{found.num_parameters:>8}{found.build_seconds:>9.2f}{found.warm_up_seconds:>11.2f}"
        row += f"{found.rss_mib:>9.0f}{found.num_objects:>9}{found.visited_rss_mib:>7.1f}{found.visited_objects:>9}"
        row += f"  {interval(found.ratios['full'])!s:21}  {interval(found.ratios['common'])!s:21}"
        in_step = interval([own for own, _ in found.steps]).median
        print(f"{row}  {in_step * 1e3:>5.1f}  {interval([own / first for own, first in found.steps])}", flush=True)


def print_python_table(size: Size) -> None:
    """What is pure Python and might grow with the space, in ms."""
    print("\n(c) Python alone, ms\n")
    rows = {number: python_ms(size, space) for number, space in spaces(size).items()}
    names = next(iter(rows.values()))
    print(f"{'':28}" + "".join(f"{number:>9}" for number in rows))
    for name in names:
        print(f"{name:28}" + "".join(f"{row[name]:>9.3f}" for row in rows.values()))


def python_ms(size: Size, space: SubNetSpace) -> dict[str, float]:
    """Each is done once; a step's plan is the mean of 50."""
    model, names = nested_llama(size, space), [subnet.name for subnet in space]
    found = {
        "the space from names": ms(lambda: SubNetSpace.of(names)),
        "costs of all": ms(lambda: costs_of(space, model.family, model.config, size.row_tokens)),
        "set_subnet": ms(lambda: [model.set_subnet(subnet) for subnet in model.space]) / len(space),
    }
    for strategy in STRATEGIES:
        sampler = Sampler(model.space, Policy(4, strategy), seed=1)
        found[f"a step's plan, {strategy}"] = ms(lambda sampler=sampler: list(map(sampler.plan, range(50)))) / 50
        found[f"expected visits, {strategy}"] = ms(lambda sampler=sampler: sampler.expected_visits(1000))
    return found


def ms(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3
