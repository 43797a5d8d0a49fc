"""Prints how far the formulas of docs/exactness.md are from what is measured, and what they say for many GPUs.

Traffic: every collective of a step of four sub-networks, counted, against `sorted_ds.run.traffic`. Memory: live tensor
bytes between steps against `sorted_ds.run.plan.state_bytes`. Compute: the time of a micro-batch of each sub-network
against the full network's, scaled by FLOPs. Then a Llama of 8 B parameters on 8 to 512 GPUs, which nobody has run.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig

from benchmarks.common import SIZES, Setting, costs, engine_of, interval, nested_llama, timed, token_ids
from sorted_ds.data.loader import deal
from sorted_ds.engine import Engine
from sorted_ds.nested import costs_of, sorted_by_cost, union_parameters
from sorted_ds.run.config import Optim
from sorted_ds.run.plan import FORWARD_AND_BACKWARD, state_bytes
from sorted_ds.run.traffic import StepSizes, Traffic, step_traffic
from sorted_ds.space import Pass, Policy, SubNet, SubNetSpace
from sorted_ds.space.sampling import Sampler
from tests.batches import LLAMA, TASK, batch, blank
from tests.memory import StepBytes, of_subnets
from tests.spawn import on_ranks
from tests.traffic import counted

STAGES = (0, 1, 2, 3)
MODES = [(stage, bf16) for stage in STAGES for bf16 in (False, True)]
TINY, TIMED = SIZES["tiny"], SIZES["middle"]
SUBNETS = ["d2-g1-f96", "d4-g4-f96", "d8-g2-f192", "d8-g4-f192"]
BUCKET = 1000
"""Elements of gradients that are reduced together. DeepSpeed's 500 M would hide the model states."""
GIB = 2**30

EIGHT_B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
EIGHT_B_SPACE = SubNetSpace.grid(depths=[16, 20, 24, 28, 32], groups=[4, 8], ffn=[7168, 10752, 14336])
ROW_TOKENS, STEP_ROWS, SUBNETS_PER_STEP, MICRO_BATCH_ROWS = 4096, 1024, 4, 4
SMALL_CHANGE = 1000
"""Bytes of norms and flags that are not counted."""
GPUS = (8, 32, 128, 512)


# Traffic


def exchanged(ranks) -> dict[tuple[int, bool], dict[str, int]]:
    """For each mode: bytes by kind in one step of the four sub-networks."""
    found = {}
    for stage, bf16 in MODES:
        config: dict = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
        config |= {"bf16": {"enabled": True}} if bf16 else {}
        model = nested_llama(TINY, dtype=torch.bfloat16 if bf16 else torch.float32)
        engine = Engine(model, TASK, config, "benchmark", Optim(), TINY.rows, ranks)
        engine.warm_up(blank(TINY.rows, TINY.row_tokens))
        ids = token_ids(TINY, ranks)
        with counted() as traffic:
            for name in SUBNETS:
                engine.backward(engine.forward(batch(ids, ids), Pass(engine.model.space[name])).loss)
            engine.step(0.0)
        found[stage, bf16] = traffic.bytes
    return found


def told(stage: int, bf16: bool) -> Traffic:
    model = nested_llama(TINY)
    costs = costs_of(model.space, model.family, model.config, TINY.row_tokens)
    subnets = [model.space[name] for name in SUBNETS]
    union = union_parameters([subnets], model.family, model.config)[0]
    samples = StepSizes([costs[s].parameters for s in subnets], union, forwards=1)
    return step_traffic(stage, bf16, costs[model.space.full].parameters, samples)


def print_traffic(num_ranks: int, folder: Path) -> None:
    found = on_ranks(num_ranks, exchanged, folder=folder)
    print(f"\nTraffic of a step of {', '.join(SUBNETS)} on {num_ranks} ranks: kB gathered, reduced, scattered\n")
    for (stage, bf16), seen in found.items():
        formula = told(stage, bf16)
        gathered = formula.gathered if num_ranks > 1 else 0  # a rank alone has all weights; a reduction is still called
        pairs = list(zip((gathered, formula.reduced, formula.scattered), seen.values(), strict=False))
        worst = max(abs(b - a) / max(a, b) for a, b in pairs if max(a, b) > SMALL_CHANGE)
        cells = "".join(f"{a / 1000:>10,.1f}{b / 1000:>10,.1f}" for a, b in pairs)
        print(f"stage {stage} {'bf16' if bf16 else 'fp32'}  formula, counted: {cells}   error {worst:.1%}", flush=True)


# Memory


def held(ranks) -> dict[tuple[int, bool], StepBytes]:
    """For each mode: live bytes of the rank with most, AdamW, the full network."""
    model, found = nested_llama(TINY), {}
    for stage, bf16 in MODES:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": BUCKET}
        call = (ranks, model.config, model.space, zero, token_ids(TINY, ranks), bf16)
        found[stage, bf16] = of_subnets(*call)["full"]
    return found


def print_memory(num_ranks: int, folder: Path) -> None:
    found = on_ranks(num_ranks, held, folder=folder)
    num = sum(p.numel() for p in nested_llama(TINY).parameters())
    print(
        f"\nModel states between steps on {num_ranks} ranks, AdamW: bytes per parameter and rank; most in the update\n"
    )
    for (stage, bf16), live in found.items():
        formula = state_bytes(stage, bf16, "adamw").between_steps(stage, bf16, num, num_ranks)
        mode = f"stage {stage} {'bf16' if bf16 else 'fp32'}"
        row = f"{mode}  formula {formula / num:.2f}  live {live.between / num:.2f}"
        print(f"{row}  error {live.between / formula - 1:+.1%}  update {live.update / num:.2f}", flush=True)


# Compute


def seconds(ranks, rounds: int) -> dict[str, list[float]]:
    """For each sub-network: each round's CPU time of forward and backward, as a multiple of the full network's."""
    setting = Setting(TIMED, stage=0, cpu_time=True)
    engine = engine_of(nested_llama(TIMED), setting, Optim(), ranks)
    ids, space = token_ids(TIMED, ranks), engine.model.space

    def passes(subnet: SubNet) -> None:
        engine.backward(engine.forward(batch(ids, ids), Pass(subnet)).loss)

    found: dict[str, list[float]] = {subnet.name: [] for subnet in space}
    for _ in range(rounds):
        once = {}
        for subnet in space:
            once[subnet.name] = timed(partial(passes, subnet), ranks, setting)
        engine.step(0.0)
        for name, value in once.items():
            found[name].append(value / once[space.full.name])
    return found


def print_compute(num_ranks: int, rounds: int, folder: Path) -> None:
    found = on_ranks(num_ranks, seconds, rounds, folder=folder)
    flops = {subnet: cost.flops_per_token for subnet, cost in costs(TIMED).items()}
    full = flops[TIMED.space().full]
    print(f"\nTime on {num_ranks} ranks of forward and backward over the full network's: by FLOPs, and measured\n")
    for subnet in flops:
        formula, measured = flops[subnet] / full, interval(found[subnet.name])
        print(f"{subnet.name:13} {formula:.3f}  {measured}  error {formula / measured.median - 1:+.1%}", flush=True)


# Many GPUs


def print_many(gb_per_second: float, peak_tflops: float, mfu: float) -> None:
    space = sorted_by_cost(EIGHT_B_SPACE, LLAMA, EIGHT_B)
    costs = costs_of(space, LLAMA, EIGHT_B, ROW_TOKENS)
    sampler = Sampler(space, Policy(SUBNETS_PER_STEP, "stratified"), seed=0)
    steps = [sampler.sample(step) for step in range(len(space))]
    full = costs[space.full].parameters
    print(
        f"\nNot validated at this size. {full / 1e9:.1f} B parameters, {len(space)} sub-networks, bf16, AdamW, "
        f"{SUBNETS_PER_STEP} sub-networks and {STEP_ROWS} rows of {ROW_TOKENS} tokens a step, at most "
        f"{MICRO_BATCH_ROWS} a forward pass.\n{peak_tflops:g} TFLOP/s x {mfu:.0%}, "
        f"{gb_per_second:g} GB/s a GPU. Seconds of a step: compute, and what ranks send without any overlap.\n"
    )
    print(f"{'GPUs':>5}{'compute':>9}" + "".join(f"{f'stage {s}':>9}{'GiB':>7}" for s in STAGES))
    unions = union_parameters(steps, LLAMA, EIGHT_B)
    for gpus in GPUS:
        dealt = deal(STEP_ROWS, SUBNETS_PER_STEP, MICRO_BATCH_ROWS, gpus)
        rows = dealt.forwards * dealt.rows_per_forward
        flops = sum(FORWARD_AND_BACKWARD * costs[s].flops_per_token for step in steps for s in step) / len(steps)
        row = f"{gpus:>5}{flops * rows * ROW_TOKENS / (peak_tflops * 1e12 * mfu):>9.2f}"
        for stage in STAGES:
            row += f"{sent(stage, full, steps, unions, costs, dealt.forwards, gpus) / gb_per_second / 1e9:>9.2f}"
            row += f"{state_bytes(stage, True, 'adamw').per_rank(stage, full, gpus) / GIB:>7.1f}"
        print(row)


def sent(stage: int, full: int, steps: list[list[SubNet]], unions: list[int], costs, forwards: int, gpus: int) -> float:
    """Bytes a rank sends in a step, on average."""
    sampled = [
        StepSizes([costs[s].parameters for s in step], u, forwards) for step, u in zip(steps, unions, strict=True)
    ]
    return sum(step_traffic(stage, True, full, samples).sent(gpus) for samples in sampled) / len(sampled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--gb-per-second", type=float, default=50, help="of each GPU between nodes")
    parser.add_argument("--peak-tflops", type=float, default=989)
    parser.add_argument("--mfu", type=float, default=0.4)
    parser.add_argument("--only-formulas", action="store_true")
    args = parser.parse_args()
    if not args.only_formulas:
        with tempfile.TemporaryDirectory() as folder:
            for num_ranks in args.ranks:
                print_traffic(num_ranks, Path(folder) / f"traffic{num_ranks}")
                print_memory(num_ranks, Path(folder) / f"memory{num_ranks}")
                print_compute(num_ranks, args.rounds, Path(folder) / f"compute{num_ranks}")
    print_many(args.gb_per_second, args.peak_tflops, args.mfu)


if __name__ == "__main__":
    main()
