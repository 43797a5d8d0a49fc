"""`sorted-ds plan`: prints what a run will do and cost, and checks what can be checked."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict

from sorted_ds.launcher import num_devices
from sorted_ds.plan import Plan, make_plan
from sorted_ds.resolve import check_run
from sorted_ds.run_file import load_run
from sorted_ds.tables import console, human, memory_table, plan_table


def run(args: argparse.Namespace) -> int:
    settings = load_run(args.run_file, args.overrides)
    config, space = check_run(settings)
    plan = make_plan(settings, space, config, args.ranks or num_devices() or 1)
    if args.json:
        print(json.dumps(asdict(plan)))
        return 0
    out = console()
    out.print(plan_table(plan), "", *lines(plan), "", memory_table(plan.memory), sep="\n", soft_wrap=True)
    for warning in plan.warnings:
        out.print(f"\nwarning: {warning}", style="yellow", soft_wrap=True)
    return 0


def lines(plan: Plan) -> Iterator[str]:
    """The step's arithmetic, the compute and what the memory table counts."""
    total = plan.steps * plan.tokens_per_step
    yield (
        f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens, {human(total)} in all; {plan.draws} draws a step of "
        f"{plan.rows_per_draw} rows each"
    )
    yield (
        f"ranks: {plan.num_ranks}; forward passes of each for one draw: {plan.forwards_per_draw}; rows in each: "
        f"{plan.rows_per_forward}; rows that are padding: {plan.padded_fraction:.1%}"
    )
    flops = plan.flops
    yield ""
    yield "Compute of forward and backward (3 x forward; without the optimizer), expected:"
    num, tokens = len(plan.subnets), human(total)
    full, each = human(flops.full_alone), human(flops.each_alone)
    yield f"  this run, {num} sub-networks: {human(flops.run)} FLOPs; each by itself on the tokens it is drawn for"
    yield "    costs the same in sum, since a draw costs its own size"
    yield f"  the full network alone on all {tokens} tokens: {full}, {_times(flops.full_alone, flops.run)}"
    yield f"  each by itself on all {tokens} tokens: {each}, {_times(flops.each_alone, flops.run)}"
    yield ""
    yield (
        f"Model states per GPU in {plan.memory.precision}, bytes per parameter, {human(plan.subnets[-1].parameters)} "
        f"parameters on {plan.num_ranks} ranks. Stage 1 shares out the optimizer's part, 2 the gradients too, "
        "3 the weights too; activations and buffers come on top."
    )


def _times(other: float, this: float) -> str:
    return f"{other / this:.3g} x this run"
