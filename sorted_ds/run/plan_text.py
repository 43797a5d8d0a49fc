"""Formats a plan for people, as tables and sentences.

In: a `Plan`. Out: what `sorted-ds plan` prints, and what `train` prints when it starts.
"""

from collections.abc import Iterator

from rich.table import Table

from sorted_ds.deploy.speed import GIB
from sorted_ds.deploy.table import COST_COLUMNS, cost_cells, human, numbers_table
from sorted_ds.run.plan import Plan


def plan_table(plan: Plan) -> Table:
    """Returns a table with a line for each sub-network, in ascending order of parameters."""
    table = numbers_table("sub-network", *COST_COLUMNS, "share", "visits", "tokens")
    for row in plan.subnets:
        visits = (f"{row.share_of_samples:.1%}", f"{row.visits:,.0f}", human(row.tokens))
        table.add_row(row.subnet, *cost_cells(row), *visits)
    return table


def stage_table(plan: Plan) -> Table:
    """Returns a table with a line for each ZeRO stage: model states on a rank, and what it sends in a step."""
    memory = plan.memory
    table = numbers_table("ZeRO stage", "weights", "gradients", "optimizer", "per rank", "sent in a step")
    for stage, size in memory.bytes_per_parameter.items():
        table.add_row(
            f"{stage}{'  (this run)' if stage == memory.chosen_stage else ''}",
            *(f"{part} B" for part in (size.weights, size.gradients, size.optimizer)),
            f"{memory.bytes_per_rank[stage] / GIB:,.3g} GiB",
            f"{plan.sent_bytes[stage] / GIB:,.3g} GiB",
        )
    return table


def step_lines(plan: Plan) -> Iterator[str]:
    """Yields how many tokens, sub-networks, rows and forward passes a step has."""
    total = plan.steps * plan.tokens_per_step
    yield (
        f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens are {human(total)} tokens in all. Each step samples "
        f"{plan.subnets_per_step} sub-networks, with {plan.rows_per_subnet} rows for each."
    )
    yield (
        f"ranks: {plan.num_ranks}; forward passes on each rank for one sub-network: {plan.forwards_per_subnet}; rows "
        f"of a forward pass: {plan.rows_per_forward}; rows that are padding: {plan.padded_fraction:.1%}"
    )


def compute_lines(plan: Plan, tflops: float | None) -> Iterator[str]:
    """Yields the training FLOPs of this run and of other trainings; with `tflops` (of one rank) also the hours."""
    flops, tokens = plan.flops, human(plan.steps * plan.tokens_per_step)
    full, each = human(flops.full_alone), human(flops.each_alone)
    yield f"Expected compute of forward and backward passes ({flops.forwards} x forward), without the optimizer:"
    terms = {"teacher": flops.teacher, "exits": flops.exits, "layer dropout": -flops.dropped}
    parts = "".join(f", {name} {value / flops.run:+.1%}" for name, value in terms.items() if value)
    yield f"  this run, which trains {len(plan.subnets)} sub-networks: {human(flops.run)} FLOPs{parts}"
    alone = _times(flops.sampled, flops.run) if parts else "the same"
    yield f"  each sub-network separately, on the tokens that it has in this run: {alone}"
    yield f"  only the full network, on all {tokens} tokens: {full} FLOPs, {_times(flops.full_alone, flops.run)}"
    yield f"  each sub-network separately, on all {tokens} tokens: {each} FLOPs, {_times(flops.each_alone, flops.run)}"
    if tflops:
        hours = flops.run / (tflops * 1e12 * plan.num_ranks) / 3600
        yield f"  time of this run if each of {plan.num_ranks} ranks computes {tflops:g} TFLOP/s: {hours:,.3g} hours"


def stage_line(plan: Plan) -> str:
    """Returns a sentence for each column of the stage table."""
    extra = plan.memory.teacher_bytes
    teacher = f" The teacher needs {extra / GIB:,.3g} GiB more." if extra else ""
    offload = " Offload keeps in host memory what counts 0 bytes here." if plan.memory.offload else ""
    return (
        f"Model states on each GPU in {plan.memory.precision}, in bytes per parameter, for "
        f"{human(plan.subnets[-1].parameters)} parameters on {plan.num_ranks} ranks. Stage 1 divides the optimizer's "
        f"part among the ranks, stage 2 also the gradients, stage 3 also the weights.{offload}{teacher} Activations "
        "and buffers need memory in addition. The last column is what each rank sends in an optimizer step, on "
        "average: gradients and gathered weights. At stages 2 and 3 it grows with sampling.subnets_per_step."
    )


def checkpoint_line(plan: Plan, is_asynchronous: bool) -> str:
    """Returns what a checkpoint needs on disk, and in host memory if training goes on while it is written."""
    size, own = (f"{plan.checkpoint_bytes / parts / GIB:,.3g} GiB" for parts in (1, plan.num_ranks))
    copied = f" A copy of {own} in host memory on each rank lets training go on meanwhile." if is_asynchronous else ""
    return f"A checkpoint takes {size}; each rank writes {own}.{copied}"


def _times(other: float, this: float) -> str:
    return f"{other / this:.3g} x this run"
