"""What makes a run this run: checkpoints of a run with another identity are refused, or grown on purpose.

In: a run, its model's config and its data's key. Out: facts by name, and a comparison with those of a checkpoint. Other
keys of a run file may change between two starts; each change is reported (run_dir.py).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from sorted_ds.base.errors import UserError
from sorted_ds.run.config import Run
from sorted_ds.space import SubNetSpace

OF_THE_RUN_FILE = ("seed", "space.", "schedule.", "batch.step_rows", "batch.row_tokens", "optim.name")
"""Sections and keys that a run cannot change and still be the same run."""
NOT_THE_MODEL = ("transformers_version", "dtype", "use_cache", "architectures", "_name_or_path")
"""Keys of a Hugging Face config that say nothing of the network."""
SPACE, MODEL = "space.", "model."


@dataclass(frozen=True)
class Identity:
    """The facts, as JSON texts by name."""

    facts: dict[str, str]
    extends_space: bool = False
    """Whether this run may go on from a checkpoint whose space is a part of its own."""

    @classmethod
    def of(cls, run: Run, config: PreTrainedConfig, data_key: str) -> "Identity":
        keys = flat(run.model_dump(mode="json"))
        model = flat({key: value for key, value in config.to_dict().items() if key not in NOT_THE_MODEL})
        facts = {key: value for key, value in keys.items() if key.startswith(OF_THE_RUN_FILE)}
        facts |= {f"{MODEL}{key}": value for key, value in model.items()}
        return cls({**facts, "data": data_key}, run.checkpoint.extend_space)

    def check(self, there: Mapping[str, str], folder: Path) -> str:
        """Whether the checkpoints of `folder`, which are of `there`, are this run's; returns how the space grew, if so.

        Raises: UserError when they are another run's.
        """
        keys = dict.fromkeys([*self.facts, *there])
        differing = [key for key in keys if there.get(key) != self.facts.get(key)]
        # Another version of transformers may write more keys, or fewer; another model differs in those of both.
        differing = [key for key in differing if not key.startswith(MODEL) or (key in there and key in self.facts)]
        if not differing:
            return ""
        if all(key.startswith(SPACE) for key in differing):
            return self._extended(there, folder)
        key = next(key for key in differing if not key.startswith(SPACE))
        more = f" (and {len(differing) - 1} more keys)" if len(differing) > 1 else ""
        raise UserError(
            f"{folder} belongs to another run: {key} = {there.get(key)} there, {self.facts.get(key)} here{more}. Set "
            "another run_dir, or make the run file as it was."
        )

    def _extended(self, there: Mapping[str, str], folder: Path) -> str:
        before, now = _space_of(there), _space_of(self.facts)
        if gone := [subnet.name for subnet in before if subnet not in now]:
            raise UserError(
                f"{folder} belongs to a run whose space has {gone[0]} ({len(gone)} in all) which this run's has not. A "
                "space can only grow: add to it what is missing, or set another run_dir."
            )
        if len(before) < len(now) and not self.extends_space:
            raise UserError(
                f"{folder} belongs to a run with {len(before)} of this run's {len(now)} sub-networks. To train the "
                "others too from there on, with the same weights, start with --extend-space; else set another run_dir."
            )
        return f"the space grows from {len(before)} to {len(now)} sub-networks" if len(before) < len(now) else ""


def _space_of(facts: Mapping[str, str]) -> SubNetSpace:
    said = {key.removeprefix(SPACE): json.loads(value) for key, value in facts.items() if key.startswith(SPACE)}
    if said["subnets"]:
        return SubNetSpace.of(said["subnets"])
    return SubNetSpace.grid(said["depths"], said["groups"], said["ffn"])


def flat(fields: Mapping, prefix: str = "") -> dict[str, str]:
    """Nested keys joined by dots, values as JSON."""
    found: dict[str, str] = {}
    for key, value in fields.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: json.dumps(value)}
    return found
