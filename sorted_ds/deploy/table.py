"""The tables that commands print, and numbers as people read them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from sorted_ds.deploy.model_dir import Measured

if TYPE_CHECKING:
    from sorted_ds.tasks import Metric

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


def measured_table(
    rows: Sequence[Measured], metrics: Sequence["Metric"], baseline: Mapping[str, float] | None
) -> Table:
    """Every measured sub-network, ascending in parameters, and the baseline's loss as the last line."""
    costs = ("params", "non-emb.", "FLOPs/tok", "KV B/tok")
    table = numbers_table("sub-network", *(metric.title for metric in metrics), *costs)
    for row in rows:
        table.add_row(
            row.subnet,
            *(metric.text(row.metrics[metric.name]) for metric in metrics),
            human(row.parameters),
            human(row.non_embedding_parameters),
            human(row.flops_per_token),
            f"{row.kv_bytes_per_token:,}",
        )
    table.add_section()
    for name, loss in (baseline or {}).items():
        table.add_row(name, metrics[0].text(loss))
    return table


def numbers_table(first: str, *others: str) -> Table:
    """One column of names, the others numbers."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")  # fits 80 columns
    table.add_column(first, no_wrap=True)
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table
