"""Decides whether a checkpoint belongs to this run: another run's is refused, and a space grows only on purpose.

In: facts by name, of this run and of a checkpoint (run/run_dir.py says which keys they are). Out: whether the
checkpoint is this run's. Other keys of a run file may change between two starts; each change is reported.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sorted_ds.base.errors import UserError
from sorted_ds.space import AXES, SubNetSpace

SPACE, MODEL = "space.", "model."
LAYER_ORDER = f"{SPACE}layer_order"

RENAMED = {"schedule.draws": "sampling.subnets_per_step", "schedule.strategy": "sampling.strategy"}
"""Keys of version 0.1 and their present names. Runs of that version resume."""
ADDED = {
    "task": '"causal_lm"',
    LAYER_ORDER: "[]",
    **{f"{SPACE}{axis.sizes}": "[]" for axis in AXES.values()},
    "sampling.full_shares": "1",
    "sampling.subnets_per_share": "1",
    "sampling.hold_steps": "1",
    "sampling.ladder": "[]",
    "sampling.cost_power": "0.0",
    "sampling.phases": "[]",
    "batch.isolate": "false",
}
"""Keys that a checkpoint of an earlier version may not have, with the value that it was trained with."""


@dataclass(frozen=True)
class Identity:
    """The facts, as JSON texts by name."""

    facts: dict[str, str]
    extends_space: bool = False
    """Whether this run may go on from a checkpoint whose space is a part of its own."""

    def check(self, facts: Mapping[str, str], folder: Path) -> str:
        """Compares with the facts of the checkpoints in `folder`. Returns how the space has grown, or nothing.

        Raises: UserError when the checkpoints are another run's.
        """
        there, here = with_current_keys(facts), with_current_keys(self.facts)
        keys = dict.fromkeys([*here, *there])
        differing = [key for key in keys if there.get(key) != here.get(key)]
        # Another version of transformers may write more keys, or fewer; another model differs in those of both.
        differing = [key for key in differing if not key.startswith(MODEL) or (key in there and key in here)]
        if not differing:
            return ""
        if all(key.startswith(SPACE) and key != LAYER_ORDER for key in differing):
            return self._extended(there, here, folder)
        key = next(key for key in differing if not key.startswith(SPACE) or key == LAYER_ORDER)
        more = f" (and {len(differing) - 1} more keys)" if len(differing) > 1 else ""
        raise UserError(
            f"{folder} belongs to another run: {key} = {there.get(key)} there, {here.get(key)} here{more}. Set "
            "another run_dir, or make the run file as it was."
        )

    def check_branch(self, facts: Mapping[str, str], checkpoint: Path) -> None:
        """Compares a run that branches off with the checkpoint. Data, seed, sampling and batch may differ.

        Raises: UserError when the model, its space, the task or the optimizer is another.
        """
        common = (SPACE, MODEL, "task", "optim.")
        there, here = (
            {key: value for key, value in each.items() if key.startswith(common)}
            for each in (with_current_keys(facts), with_current_keys(self.facts))
        )
        Identity(here, self.extends_space).check(there, checkpoint)

    def _extended(self, there: Mapping[str, str], here: Mapping[str, str], folder: Path) -> str:
        before, now = _space_of(there), _space_of(here)
        if gone := [subnet.name for subnet in before if subnet not in now]:
            raise UserError(
                f"{folder} belongs to a run whose space has {gone[0]} ({len(gone)} in all), which this run's space "
                "does not have. A space can only grow: add to it what is missing, or set another run_dir."
            )
        if len(before) < len(now) and not self.extends_space:
            raise UserError(
                f"{folder} belongs to a run with {len(before)} of this run's {len(now)} sub-networks. To train the "
                "others too from there on, with the same weights, start with --extend-space; else set another run_dir."
            )
        return f"the space grows from {len(before)} to {len(now)} sub-networks" if len(before) < len(now) else ""


def _space_of(facts: Mapping[str, str]) -> SubNetSpace:
    values = {key.removeprefix(SPACE): json.loads(value) for key, value in facts.items() if key.startswith(SPACE)}
    names, order = values.pop("subnets"), values.pop("layer_order") or None
    if names:
        return SubNetSpace.of(names, order)
    return SubNetSpace.grid(layer_order=order, **{key: sizes for key, sizes in values.items() if sizes})


def with_current_keys(facts: Mapping[str, str]) -> dict[str, str]:
    """Returns the facts under today's keys. A key that an earlier version lacked gets the value that it implied.

    The network's own sequence of layers is written as no order at all.
    """
    renamed = {RENAMED.get(key, key): value for key, value in facts.items()}
    current = {**{key: value for key, value in ADDED.items() if f"{SPACE}subnets" in renamed}, **renamed}
    order = json.loads(current.get(LAYER_ORDER, "[]"))
    return {**current, LAYER_ORDER: "[]"} if order and order == sorted(order) else current


def flat(fields: Mapping, prefix: str = "") -> dict[str, str]:
    """Returns nested fields under dotted keys, with JSON values."""
    found: dict[str, str] = {}
    for key, value in fields.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: json.dumps(value)}
    return found
