"""Selects the best measured sub-network within a budget by a look-up in the measured table.

In: the table, and one or two budgets. Out: one row of the table. Nothing is trained, loaded or run.
"""

import re
from collections.abc import Sequence

from sorted_ds.base.errors import UserError
from sorted_ds.deploy.model_dir import Measured
from sorted_ds.deploy.table import UNITS, human

SIZES = {"": 1.0, "G": 1e9} | {unit.upper(): size for unit, size in UNITS}
"""The units in which a budget may be written. G and B both mean 1e9."""


def parse_amount(text: str) -> float:
    """Returns the number that `2.5B`, `300M`, `5G` or `1e6` means. Raises: UserError for any other text, and for 0."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)(E[+-]?\d+)?([KMGBTP]?)", text.strip().upper())
    amount = float(found[1] + (found[2] or "")) * SIZES[found[3]] if found else 0.0
    if not 0 < amount < float("inf"):
        raise UserError(f"{text!r} is not an amount. Write a number above zero like 2.5B, 300M or 1e6.")
    return amount


def select(
    rows: Sequence[Measured], max_params: float | None = None, max_flops_per_token: float | None = None
) -> Measured:
    """Returns the row with the lowest loss within every budget. Of equal losses it takes the one with fewer parameters.

    Raises: UserError when no budget is given, or no row is within it.
    """
    if max_params is None and max_flops_per_token is None:
        raise UserError("select needs a budget. Give --max-params, --max-flops or both.")
    fitting = [
        row
        for row in rows
        if row.parameters <= (max_params or float("inf"))
        and row.flops_per_token <= (max_flops_per_token or float("inf"))
    ]
    if not fitting:
        smallest = min(rows, key=lambda row: row.parameters)
        raise UserError(
            f"none of {len(rows)} sub-networks is within the budget. The smallest, {smallest.subnet}, has "
            f"{smallest.parameters:,} parameters and {smallest.flops_per_token:,} FLOPs per token. Allow at least that."
        )
    return min(fitting, key=lambda row: (row.loss, row.parameters))


def reason(selected: Measured, rows: Sequence[Measured]) -> str:
    """Explains the selection in one line, which compares the row's loss and size with the largest one's."""
    largest = max(rows, key=lambda row: row.parameters)
    return (
        f"{selected.subnet} has the lowest loss within the budget: {selected.loss:.4f} nats per target "
        f"({selected.loss - largest.loss:+.4f} against {largest.subnet}); {human(selected.parameters)} parameters "
        f"({selected.parameters / largest.parameters:.0%} of {largest.subnet}), "
        f"{human(selected.flops_per_token)} FLOPs per token ({selected.flops_per_token / largest.flops_per_token:.0%})"
    )
