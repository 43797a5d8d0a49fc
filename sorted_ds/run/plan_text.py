"""The plan as people read it: tables and lines.

In: a `Plan`. Out: what `sorted-ds plan` prints, and what `train` prints when it starts.
"""

from collections.abc import Iterator

from rich.table import Table

from sorted_ds.deploy.table import GIB, human, numbers_table
from sorted_ds.run.plan import Plan


def plan_table(plan: Plan) -> Table:
    """Every sub-network of a plan, ascending in parameters."""
    table = numbers_table("sub-network", "params", "non-emb.", "FLOPs/tok", "KV B/tok", "share", "visits", "tokens")
    for row in plan.subnets:
        table.add_row(
            row.subnet,
            human(row.parameters),
            human(row.non_embedding_parameters),
            human(row.flops_per_token),
            f"{row.kv_bytes_per_token:,}",
            f"{row.share_of_samples:.1%}",
            f"{row.visits:,.0f}",
            human(row.tokens),
        )
    return table


def stage_table(plan: Plan) -> Table:
    """Model states per rank and what it sends in a step, a line for each ZeRO stage; the run's own is marked."""
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
    """The step's arithmetic."""
    total = plan.steps * plan.tokens_per_step
    yield (
        f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens, {human(total)} in all; {plan.subnets_per_step} "
        f"sub-networks a step, {plan.rows_per_subnet} rows for each"
    )
    yield (
        f"ranks: {plan.num_ranks}; forward passes of each for one sub-network: {plan.forwards_per_subnet}; rows "
        f"in each: {plan.rows_per_forward}; rows that are padding: {plan.padded_fraction:.1%}"
    )


def compute_lines(plan: Plan, tflops: float | None) -> Iterator[str]:
    """Training FLOPs against training each size by itself; hours at `tflops` TFLOP/s of each rank."""
    flops, total = plan.flops, plan.steps * plan.tokens_per_step
    yield f"Compute of forward and backward ({plan.flops.forwards} x forward; without the optimizer), expected:"
    num, tokens = len(plan.subnets), human(total)
    full, each = human(flops.full_alone), human(flops.each_alone)
    yield f"  this run, {num} sub-networks: {human(flops.run)} FLOPs; each by itself on its own tokens costs"
    yield "    the same in sum, since a sampled sub-network costs its own size"
    yield f"  the full network alone on all {tokens} tokens: {full}, {_times(flops.full_alone, flops.run)}"
    yield f"  each by itself on all {tokens} tokens: {each}, {_times(flops.each_alone, flops.run)}"
    if tflops:
        hours = flops.run / (tflops * 1e12 * plan.num_ranks) / 3600
        yield f"  hours of this run at {tflops:g} TFLOP/s of each of {plan.num_ranks} ranks: {hours:,.3g}"


def stage_line(plan: Plan) -> str:
    """What the table of stages counts."""
    offload = ", and offload keeps what counts 0 here on the CPU" if plan.memory.offload else ""
    return (
        f"Model states per GPU in {plan.memory.precision}, bytes per parameter, {human(plan.subnets[-1].parameters)} "
        f"parameters on {plan.num_ranks} ranks. Stage 1 shares out the optimizer's part, 2 the gradients too, "
        f"3 the weights too{offload}; activations and buffers come on top. Sent by each rank in an optimizer step, on "
        "average: gradients and gathered weights, which grow with sampling.subnets_per_step at stages 2 and 3 alone."
    )


def checkpoint_line(plan: Plan, is_asynchronous: bool) -> str:
    """What a save writes, and keeps meanwhile."""
    each = f"{plan.checkpoint_bytes / plan.num_ranks / GIB:,.3g} GiB"
    copied = "; as much host memory for a copy, from which it is written while training goes on" * is_asynchronous
    return f"A checkpoint: {plan.checkpoint_bytes / GIB:,.3g} GiB, of which each rank writes {each}{copied}."


def _times(other: float, this: float) -> str:
    return f"{other / this:.3g} x this run"
