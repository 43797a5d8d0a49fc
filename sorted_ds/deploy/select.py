"""Selection: the best measured sub-network within a budget, a look-up in the measured table.

In: the table and one or two budgets. Out: one row of it. Nothing is searched, loaded or run.
"""

import re
from collections.abc import Sequence

from sorted_ds.base.errors import UserError
from sorted_ds.deploy.model_dir import Measured
from sorted_ds.deploy.table import UNITS, human

SIZES = {"": 1.0, "G": 1e9} | {unit.upper(): size for unit, size in UNITS}


def parse_amount(text: str) -> float:
    """`2.5B`, `300M`, `5G`, `1e6` as a number. Raises: UserError when it is none, or not above zero."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)(E[+-]?\d+)?([KMGBTP]?)", text.strip().upper())
    amount = float(found[1] + (found[2] or "")) * SIZES[found[3]] if found else 0.0
    if not 0 < amount < float("inf"):
        raise UserError(f"{text!r} is no amount. Write a number above zero like 2.5B, 300M or 1e6.")
    return amount


def select(
    rows: Sequence[Measured], max_params: float | None = None, max_flops_per_token: float | None = None
) -> Measured:
    """The row of lowest loss within every budget; of equal losses the one with fewer parameters.

    Raises: UserError when no budget is given, or nothing fits.
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
            f"none of {len(rows)} sub-networks fits. The smallest, {smallest.subnet}, has {smallest.parameters:,} "
            f"parameters and {smallest.flops_per_token:,} FLOPs per token. Allow at least these."
        )
    return min(fitting, key=lambda row: (row.loss, row.parameters))


def reason(chosen: Measured, rows: Sequence[Measured]) -> str:
    """Why it was chosen, in one line: its loss and size against the largest's."""
    largest = max(rows, key=lambda row: row.parameters)
    return (
        f"{chosen.subnet}: lowest loss within the budget, {chosen.loss:.4f} nats per token "
        f"({chosen.loss - largest.loss:+.4f} against {largest.subnet}); {human(chosen.parameters)} parameters "
        f"({chosen.parameters / largest.parameters:.0%} of {largest.subnet}), "
        f"{human(chosen.flops_per_token)} FLOPs per token ({chosen.flops_per_token / largest.flops_per_token:.0%})"
    )
