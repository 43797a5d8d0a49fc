"""What lies in a trained model's directory beside Hugging Face's own files.

    RUN_DIR/model/           the full network as an ordinary Hugging Face directory
    RUN_DIR/model/sorted.json   the space, the data it was trained on, and the measured table
    RUN_DIR/subnets.json     the measured table alone
    RUN_DIR/pareto.png       the table as a figure

Training writes sorted.json, evaluation the table; selection and export read them. No torch here: a look-up is quick.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sorted_ds.base.errors import UserError
from sorted_ds.space import SubNetSpace

SORTED_JSON = "sorted.json"
SUBNETS_JSON = "subnets.json"
PARETO_PNG = "pareto.png"


@dataclass(frozen=True)
class Measured:
    """One sub-network on the validation rows, and what it costs."""

    subnet: str
    metrics: dict[str, float]
    """The task's metrics by name; in JSON they stand beside the other fields."""
    num_targets: int
    parameters: int
    non_embedding_parameters: int
    flops_per_token: int
    kv_bytes_per_token: int

    @property
    def loss(self) -> float:
        """The mean loss in nats per target, which every task has."""
        return self.metrics["loss"]

    def to_json(self) -> dict[str, object]:
        """The fields of the row in subnets.json and sorted.json."""
        costs = {field.name: getattr(self, field.name) for field in fields(self)[2:]}
        return {"subnet": self.subnet, **self.metrics, **costs}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Measured":
        """Raises: KeyError when a field is missing."""
        names = [field.name for field in fields(cls)]
        own = {name: row[name] for name in names if name != "metrics"}
        return cls(metrics={key: row[key] for key in ("loss", *row) if key not in own}, **own)


@dataclass(frozen=True)
class Sorted:
    """The contents of sorted.json."""

    space: tuple[str, ...]
    """Names of the sub-networks, ascending in parameters."""
    data: Mapping[str, object]
    """The run's data settings, and `tokens_dir`, where the prepared tokens are."""
    row_tokens: int
    eval_rows: int
    """Validation rows that an evaluation uses at most."""
    task: str = "causal_lm"
    """What the network was trained for."""
    layer_order: tuple[int, ...] | None = None
    """The order in which depth takes the layers; None in files that do not say: the network's own sequence."""
    checkpoint: str | None = None
    """Fingerprint of the checkpoint whose weights these are; None in files that do not say."""
    subnets: tuple[Measured, ...] = ()
    """The measured table; empty before the first evaluation."""
    baseline: Mapping[str, float] | None = None
    """Name and validation loss of something trivial to compare with, like a unigram model; set with the table."""

    @property
    def sub_networks(self) -> SubNetSpace:
        """The space. Raises: UserError when the names or the layer order make none."""
        return SubNetSpace.of(self.space, self.layer_order)


@dataclass(frozen=True)
class ModelDir:
    """Where a trained model lies: `model` holds the Hugging Face files, `root` the table and the figure."""

    root: Path
    model: Path

    @classmethod
    def find(cls, folder: Path) -> "ModelDir":
        """A run's directory, or a model directory by itself. Raises: UserError when it is neither."""
        for found in (cls(folder, folder / "model"), cls(folder, folder)):
            if (found.model / SORTED_JSON).is_file():
                return found
        if not folder.is_dir():
            raise UserError(f"{folder} is no directory. Name a run's directory, or the model directory in it.")
        raise UserError(
            f"{folder} has no {SORTED_JSON}, neither itself nor in model/. Name a run's directory whose training ended."
        )

    def read(self) -> Sorted:
        """Raises: UserError when sorted.json is damaged."""
        path = self.model / SORTED_JSON
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
            rows = tuple(Measured.from_json(row) for row in contents.pop("subnets", ()))
            nats = contents.pop("unigram_nats", None)  # from before there were other baselines
            contents = {"baseline": None if nats is None else {"unigram model": nats}, **contents}
            order = contents.pop("layer_order", None)
            contents |= {"space": tuple(contents["space"]), "layer_order": None if order is None else tuple(order)}
            found = Sorted(**contents, subnets=rows)
            _ = found.sub_networks
        except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
            raise UserError(f"{path} is no {SORTED_JSON} ({error}). Train again, or get the file again.") from error
        return found

    def write(self, contents: Sorted) -> None:
        """Complete or not at all: readers never see half a file."""
        rows = [row.to_json() for row in contents.subnets]
        _write_json(self.model / SORTED_JSON, {**asdict(contents), "subnets": rows})

    def table(self) -> tuple[Measured, ...]:
        """The measured sub-networks. Raises: UserError before the first evaluation."""
        rows = self.read().subnets
        if not rows:
            raise UserError(f"{self.root} has no measured sub-networks. Run `sorted-ds eval {self.root}` first.")
        return rows

    def add_measured(self, rows: Sequence[Measured], baseline: Mapping[str, float] | None) -> tuple[Measured, ...]:
        """Puts rows into the table in sorted.json and subnets.json, and returns the whole table in the space's order.

        Rows from before are kept where they were measured on as many targets; others cannot be compared.
        """
        contents = self.read()
        kept = [row for row in contents.subnets if row.num_targets == rows[0].num_targets]
        by_name = {row.subnet: row for row in [*kept, *rows]}
        table = tuple(by_name[name] for name in contents.space if name in by_name)
        self.write(replace(contents, subnets=table, baseline=baseline))
        _write_json(self.root / SUBNETS_JSON, {"baseline": baseline, "subnets": [row.to_json() for row in table]})
        return table


def _write_json(path: Path, fields: dict[str, object]) -> None:
    hidden = path.with_name(f".writing_{path.name}")
    hidden.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    hidden.replace(path)
