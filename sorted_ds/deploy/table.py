"""Formats numbers for people, and builds the tables that commands print.

In: measured or planned sub-networks. Out: `rich` tables, and numbers like 1.24M.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.table import Table

from sorted_ds.deploy.model_dir import Measured

if TYPE_CHECKING:
    from sorted_ds.tasks import Metric

GIB = 2**30
WIDTH_IN_A_FILE = 120
"""The fewest characters of a line that is not printed on a terminal. Every table fits."""

UNITS = (("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))
COST_COLUMNS = ("params", "non-emb.", "FLOPs/tok", "KV B/tok")
"""The titles of the columns of `cost_cells`."""


class Costs(Protocol):
    """What a sub-network costs."""

    @property
    def parameters(self) -> int: ...
    @property
    def non_embedding_parameters(self) -> int: ...
    @property
    def flops_per_token(self) -> int: ...
    @property
    def kv_bytes_per_token(self) -> int: ...


def console() -> Console:
    """Returns a console for standard output, which is wide enough for every column if it is not a terminal."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=max(out.width, WIDTH_IN_A_FILE))


def human(number: float) -> str:
    """Returns the number with three digits and a unit: 1.24M, 350k."""
    for unit, size in UNITS:
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def cost_cells(costs: Costs) -> tuple[str, ...]:
    """Returns the cells of the columns `COST_COLUMNS`."""
    return (
        human(costs.parameters),
        human(costs.non_embedding_parameters),
        human(costs.flops_per_token),
        f"{costs.kv_bytes_per_token:,}",
    )


def measured_table(
    rows: Sequence[Measured], metrics: Sequence["Metric"], baseline: Mapping[str, float] | None
) -> Table:
    """Returns a table with a line for each row, in the order of `rows`. The last line is the loss of the baseline."""
    table = numbers_table("sub-network", *(metric.title for metric in metrics), *COST_COLUMNS)
    for row in rows:
        table.add_row(row.subnet, *(metric.text(row.metrics[metric.name]) for metric in metrics), *cost_cells(row))
    table.add_section()
    for name, loss in (baseline or {}).items():
        table.add_row(name, metrics[0].text(loss))
    return table


def numbers_table(first: str, *others: str) -> Table:
    """Returns an empty table with a column of names and columns of numbers."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")  # fits 80 columns
    table.add_column(first, no_wrap=True)
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table
