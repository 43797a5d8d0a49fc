"""Selects a sub-network within budgets by a look-up in the measured table.

In: the contents of sorted.json, and budgets. Out: one row of the table, and the reason. Nothing is trained, loaded or
run. Budgets of cost (parameters, FLOPs, latency, memory) are upper ends, within which the lowest loss is selected.
Budgets of quality (a gap to the full network's loss, an accuracy) select the cheapest sub-network that keeps them.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from sorted_ds.base.errors import UserError
from sorted_ds.base.names import ACCURACY
from sorted_ds.deploy.model_dir import Measured, ModelDir, Sorted
from sorted_ds.deploy.speed import Setting, Speed
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


OPTIONS = ("--max-params", "--max-flops", "--max-latency-ms", "--max-memory-gib", "--max-loss-gap", "--min-accuracy")
MAX_PARAMS, MAX_FLOPS, MAX_LATENCY, MAX_MEMORY, MAX_GAP, MIN_ACCURACY = OPTIONS


@dataclass(frozen=True)
class Budgets:
    """What a selected sub-network must keep. Those that are None bound nothing."""

    max_params: float | None = None
    max_flops: float | None = None
    """Forward FLOPs per token."""
    max_latency_ms: float | None = None
    """For one decoded token of each row, at `setting`."""
    max_memory_gib: float | None = None
    """For the exported model's weights and cache, at `setting`."""
    max_loss_gap: float | None = None
    """Nats above the full network's loss."""
    min_accuracy: float | None = None
    setting: Setting = field(default_factory=Setting)

    def __post_init__(self) -> None:
        """Raises: UserError for a budget that is not a number above zero."""
        for name, value in vars(self).items():
            if name != "setting" and value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} = {value} is not a budget. Give a number above zero.")
        if self.min_accuracy is not None and self.min_accuracy >= 1:
            raise UserError(f"min_accuracy = {self.min_accuracy} is not a budget. Give a number below 1, like 0.5.")

    @property
    def needs_speeds(self) -> bool:
        """Whether a budget bounds what `sorted-ds eval --measure` measures."""
        return self.max_latency_ms is not None or self.max_memory_gib is not None

    def table_in(self, where: ModelDir) -> Sorted:
        """Returns the contents of sorted.json. Raises: UserError if its table does not have what the budgets bound."""
        return where.read_measured(self.setting if self.needs_speeds else None)


@dataclass(frozen=True)
class Bound:
    """One budget: what it bounds has a value for each row, which should be at most the limit."""

    limit: float
    of: Callable[[Measured], float]
    option: str
    """The option of `sorted-ds select` that sets it."""
    unit: str
    number: Callable[[float], str]
    """Formats a value, rounded so that a budget of what is printed allows the value."""

    def text(self, row: Measured) -> str:
        """Returns what the row has, with the unit."""
        return f"{self.number(self.of(row))} {self.unit}"

    def allowing(self, row: Measured) -> str:
        """Returns the option that allows the row, with its value."""
        return f"{self.option} {self.number(self.of(row)).replace(',', '')}"


def select(contents: Sorted, budgets: Budgets) -> Measured:
    """Returns the row with the lowest loss within every budget; among equal losses, the one with fewest parameters.

    With a budget of quality it returns the cheapest row within every budget (`_costs`). `contents` has a table, with
    speeds for the budgets' setting if they need some (`Budgets.table_in`).

    Raises: UserError when no budget is given, or no row is within it.
    """
    rows = _comparable(contents, budgets)
    if found := fitting(contents, rows, budgets):
        return found[0]
    raise UserError(_closest(rows, _bounds(contents, budgets)))


def fitting(contents: Sorted, rows: Sequence[Measured], budgets: Budgets) -> list[Measured]:
    """Returns those of the rows that are within every budget, the best first, as `select` says.

    Raises: UserError when no budget is given.
    """
    bounds, costs = _bounds(contents, budgets), _costs(budgets)
    found = [row for row in rows if all(bound.of(row) <= bound.limit for bound in bounds)]
    if _qualities(contents, budgets):
        return sorted(found, key=lambda row: ((costs or [PARAMETERS])[0].of(row), row.loss))
    return sorted(found, key=lambda row: (row.loss, row.parameters))


def reason(contents: Sorted, selected: Measured, budgets: Budgets) -> str:
    """Explains the selection in a few lines: its loss and costs, those of its neighbours, and where they come from."""
    cost = (_costs(budgets) or [PARAMETERS])[0]
    cheapest = bool(_qualities(contents, budgets))
    why = f"is the cheapest in {cost.unit}" if cheapest else "has the lowest loss"
    never = "" if selected.is_trained else ", which was never trained,"
    lines = [f"{selected.subnet}{never} {why} within the budget: {_described(contents, selected, budgets)}"]
    rows = _comparable(contents, budgets)
    best = frontier(rows, cost.of)
    cheaper = [row for row in best if cost.of(row) < cost.of(selected)][-1:]
    dearer = [row for row in best if cost.of(row) > cost.of(selected) and row.loss < selected.loss][:1]
    lines += [f"next cheaper: {_against(row, selected, cost)}" for row in cheaper]
    lines += [f"next dearer: {_against(row, selected, cost)}" for row in dearer]
    if left_out := len(contents.subnets) - len(rows):
        lines.append(f"{left_out} sub-networks have no speed for {budgets.setting}, and were left out")
    if budgets.needs_speeds:
        lines.append(f"speeds: {contents.measured_on}{_prediction(selected.speed(budgets.setting))}")
    return "\n".join(lines)


def frontier(
    rows: Sequence[Measured], cost: Callable[[Measured], float] = lambda row: row.parameters
) -> list[Measured]:
    """Returns the rows to which no other one of at most their cost has a lower or equal loss, in ascending order."""
    best: list[Measured] = []
    for row in sorted(rows, key=lambda row: (cost(row), row.loss)):
        if not best or row.loss < best[-1].loss:
            best.append(row)
    return best


def _bounds(contents: Sorted, budgets: Budgets) -> list[Bound]:
    """Returns all budgets. Raises: UserError when there is none, or the table cannot tell."""
    if bounds := [*_costs(budgets), *_qualities(contents, budgets)]:
        return bounds
    raise UserError(f"select needs a budget. Give {', '.join(OPTIONS[:-1])} or {OPTIONS[-1]}.")


def _costs(budgets: Budgets) -> list[Bound]:
    """Returns the budgets of cost. The first one says what is cheap; without any, parameters say it."""
    setting = budgets.setting
    latency = Bound(math.inf, lambda row: _speed(row, setting).decode_ms, MAX_LATENCY, "ms a token", _rounded_up(3))
    memory = Bound(math.inf, lambda row: _speed(row, setting).memory_gib, MAX_MEMORY, "GiB", _rounded_up(4))
    limits = (
        (latency, budgets.max_latency_ms),
        (memory, budgets.max_memory_gib),
        (FLOPS, budgets.max_flops),
        (PARAMETERS, budgets.max_params),
    )
    return [replace(bound, limit=limit) for bound, limit in limits if limit is not None]


def _qualities(contents: Sorted, budgets: Budgets) -> list[Bound]:
    """Returns the budgets of quality. Raises: UserError when the table cannot tell."""
    bounds = []
    if budgets.max_loss_gap is not None:
        full = _full(contents).loss
        unit = "nats above the full network's loss"
        bounds.append(Bound(budgets.max_loss_gap, lambda row: row.loss - full, MAX_GAP, unit, _rounded_up(4)))
    if budgets.min_accuracy is not None:
        if ACCURACY not in contents.subnets[0].metrics:
            raise UserError(f"the table has no {ACCURACY}. Leave out --min-accuracy.")
        wrong = 1 - budgets.min_accuracy
        bounds.append(Bound(wrong, lambda row: 1 - row.metrics[ACCURACY], MIN_ACCURACY, ACCURACY, _right))
    return bounds


def _rounded_up(digits: int) -> Callable[[float], str]:
    return lambda value: f"{math.ceil(value * 10**digits) / 10**digits:.{digits}f}"


def _right(wrong: float) -> str:
    """Returns the share of right answers, rounded down."""
    return f"{math.floor((1 - wrong) * 10**4) / 10**4:.4f}"


FLOPS = Bound(math.inf, lambda row: row.flops_per_token, MAX_FLOPS, "FLOPs per token", "{:,}".format)
PARAMETERS = Bound(math.inf, lambda row: row.parameters, MAX_PARAMS, "parameters", "{:,}".format)
"""Costs without a limit. Parameters say what is cheap if no cost has a budget."""


def _speed(row: Measured, setting: Setting) -> Speed:
    speed = row.speed(setting)
    assert speed is not None, f"{row.subnet} has no speed for {setting}"
    return speed


def _full(contents: Sorted) -> Measured:
    """Returns the row of the full network. Raises: UserError if it was not measured."""
    full = contents.sub_networks.full.name
    for row in contents.subnets:
        if row.subnet == full:
            return row
    raise UserError(f"the table has no loss of the full network. Run `sorted-ds eval` with --subnets {full} first.")


def _comparable(contents: Sorted, budgets: Budgets) -> list[Measured]:
    """Returns the rows that have what the budgets bound."""
    return [row for row in contents.subnets if not budgets.needs_speeds or row.speed(budgets.setting) is not None]


def _closest(rows: Sequence[Measured], bounds: Sequence[Bound]) -> str:
    """Returns the error for budgets that no row keeps. The closest row exceeds its limits by the smallest factor."""
    closest = min(rows, key=lambda row: max(bound.of(row) / bound.limit for bound in bounds))
    exceeded = [bound for bound in bounds if bound.of(closest) > bound.limit]
    return (
        f"none of {len(rows)} sub-networks is within the budget. The closest is {closest.subnet}, with "
        f"{' and '.join(bound.text(closest) for bound in exceeded)}. Select with "
        f"{' '.join(bound.allowing(closest) for bound in exceeded)}."
    )


def _described(contents: Sorted, row: Measured, budgets: Budgets) -> str:
    """Returns the loss and the costs of a row, also as compared with the largest one's."""
    largest = max(contents.subnets, key=lambda row: row.parameters)
    text = (
        f"{row.loss:.4f} nats per target ({row.loss - largest.loss:+.4f} against {largest.subnet}); "
        f"{human(row.parameters)} parameters ({row.parameters / largest.parameters:.0%} of {largest.subnet}), "
        f"{human(row.flops_per_token)} FLOPs per token ({row.flops_per_token / largest.flops_per_token:.0%})"
    )
    if budgets.needs_speeds:
        speed = _speed(row, budgets.setting)
        text += f"; {speed.decode_ms:.2f} ms a token and {speed.memory_gib:.4f} GiB at {budgets.setting}"
    return text


def _against(row: Measured, selected: Measured, cost: Bound) -> str:
    """Returns the loss and the cost of a neighbour, as compared with the selected row's."""
    return (
        f"{row.subnet}, {row.loss:.4f} nats ({row.loss - selected.loss:+.4f}), {cost.text(row)} "
        f"({cost.of(row) / cost.of(selected) - 1:+.1%})"
    )


def _prediction(speed: Speed | None) -> str:
    if speed is None or speed.is_measured:
        return ""
    return (
        f"; this one is predicted: half of such times are off by at most {speed.median_error:.0%}, and all by at most "
        f"{speed.largest_error:.0%}"
    )
