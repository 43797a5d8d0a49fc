"""The tables that commands print, and numbers as people read them."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from sorted_ds.deploy.model_dir import Measured

if TYPE_CHECKING:
    from sorted_ds.run.plan import Plan

GIB = 2**30
WIDTH_IN_A_FILE = 120

UNITS = (("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))


def console() -> Console:
    """Standard output; wide enough for every column where it is no terminal."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=max(out.width, WIDTH_IN_A_FILE))


def human(number: float) -> str:
    """Three digits and a unit: 1.24M, 350k."""
    for unit, size in UNITS:
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def measured_table(rows: Sequence[Measured], unigram_nats: float) -> Table:
    """Every measured sub-network, ascending in parameters, and the unigram model as the last line."""
    table = _table(
        "sub-network", "loss (nats)", "perplexity", "accuracy", "params", "non-emb.", "FLOPs/tok", "KV B/tok"
    )
    for row in rows:
        table.add_row(
            row.subnet,
            f"{row.loss:.4f}",
            f"{row.perplexity:.2f}",
            f"{row.accuracy:.1%}",
            human(row.parameters),
            human(row.non_embedding_parameters),
            human(row.flops_per_token),
            f"{row.kv_bytes_per_token:,}",
        )
    table.add_section()
    table.add_row("unigram model", f"{unigram_nats:.4f}", *[""] * 6)
    return table


def _table(first: str, *others: str) -> Table:
    """One column of names, the others numbers."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")  # fits 80 columns
    table.add_column(first, no_wrap=True)
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def plan_table(plan: "Plan") -> Table:
    """Every sub-network of a plan, ascending in parameters."""
    table = _table("sub-network", "params", "non-emb.", "FLOPs/tok", "KV B/tok", "share", "visits", "tokens")
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


def stage_table(plan: "Plan") -> Table:
    """Model states per rank and what it sends in a step, a line for each ZeRO stage; the run's own is marked."""
    memory = plan.memory
    table = _table("ZeRO stage", "weights", "gradients", "optimizer", "per rank", "sent in a step")
    for stage, size in memory.bytes_per_parameter.items():
        table.add_row(
            f"{stage}{'  (this run)' if stage == memory.chosen_stage else ''}",
            *(f"{part} B" for part in (size.weights, size.gradients, size.optimizer)),
            f"{memory.bytes_per_rank[stage] / GIB:,.3g} GiB",
            f"{plan.sent_bytes[stage] / GIB:,.3g} GiB",
        )
    return table


def step_lines(plan: "Plan") -> Iterator[str]:
    """The step's arithmetic."""
    total = plan.steps * plan.tokens_per_step
    yield (
        f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens, {human(total)} in all; {plan.samples} samples a step of "
        f"{plan.rows_per_sample} rows each"
    )
    yield (
        f"ranks: {plan.num_ranks}; forward passes of each for one sample: {plan.forwards_per_sample}; rows in each: "
        f"{plan.rows_per_forward}; rows that are padding: {plan.padded_fraction:.1%}"
    )


def compute_lines(plan: "Plan", tflops: float | None) -> Iterator[str]:
    """Training FLOPs against training each size by itself; hours at `tflops` TFLOP/s of each rank."""
    flops, total = plan.flops, plan.steps * plan.tokens_per_step
    yield f"Compute of forward and backward ({plan.flops.forwards} x forward; without the optimizer), expected:"
    num, tokens = len(plan.subnets), human(total)
    full, each = human(flops.full_alone), human(flops.each_alone)
    yield f"  this run, {num} sub-networks: {human(flops.run)} FLOPs; each by itself on the tokens it is active for"
    yield "    costs the same in sum, since a sample costs its own size"
    yield f"  the full network alone on all {tokens} tokens: {full}, {_times(flops.full_alone, flops.run)}"
    yield f"  each by itself on all {tokens} tokens: {each}, {_times(flops.each_alone, flops.run)}"
    if tflops:
        hours = flops.run / (tflops * 1e12 * plan.num_ranks) / 3600
        yield f"  hours of this run at {tflops:g} TFLOP/s of each of {plan.num_ranks} ranks: {hours:,.3g}"


def stage_line(plan: "Plan") -> str:
    """What the table of stages counts."""
    offload = ", and offload keeps what counts 0 here on the CPU" if plan.memory.offload else ""
    return (
        f"Model states per GPU in {plan.memory.precision}, bytes per parameter, {human(plan.subnets[-1].parameters)} "
        f"parameters on {plan.num_ranks} ranks. Stage 1 shares out the optimizer's part, 2 the gradients too, "
        f"3 the weights too{offload}; activations and buffers come on top. Sent by each rank in an optimizer step, on "
        "average: gradients and gathered weights, which grow with the number of samples at stages 2 and 3 alone."
    )


def checkpoint_line(plan: "Plan", is_asynchronous: bool) -> str:
    """What a save writes, and keeps meanwhile."""
    each = f"{plan.checkpoint_bytes / plan.num_ranks / GIB:,.3g} GiB"
    copied = "; as much host memory for a copy, from which it is written while training goes on" * is_asynchronous
    return f"A checkpoint: {plan.checkpoint_bytes / GIB:,.3g} GiB, of which each rank writes {each}{copied}."


def _times(other: float, this: float) -> str:
    return f"{other / this:.3g} x this run"
