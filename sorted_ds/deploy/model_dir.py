"""What lies in a trained model's directory beside Hugging Face's own files.

    RUN_DIR/model/           the full network as an ordinary Hugging Face directory
    RUN_DIR/model/sorted.json   the space, the data it was trained on, and the measured table
    RUN_DIR/subnets.json     the measured table alone
    RUN_DIR/pareto.png       the table as a figure

Training writes sorted.json, evaluation the table; selection and export read them. No torch here: a look-up is quick.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sorted_ds.base.errors import UserError
from sorted_ds.space import SubNetSpace

SORTED_JSON = "sorted.json"
SUBNETS_JSON = "subnets.json"
PARETO_PNG = "pareto.png"


@dataclass(frozen=True)
class Measured:
    """One sub-network on the validation rows, and what it costs."""

    subnet: str
    loss: float
    """Nats per target."""
    perplexity: float
    accuracy: float
    """Share of targets that the largest logit hits."""
    num_targets: int
    parameters: int
    non_embedding_parameters: int
    flops_per_token: int
    kv_bytes_per_token: int


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
    checkpoint: str | None = None
    """Fingerprint of the checkpoint whose weights these are; None in files that do not say."""
    subnets: tuple[Measured, ...] = ()
    """The measured table; empty before the first evaluation."""
    unigram_nats: float | None = None
    """Validation loss of the unigram model of the training text; set with the table."""


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
            fields = json.loads(path.read_text(encoding="utf-8"))
            rows = tuple(Measured(**row) for row in fields.pop("subnets", ()))
            found = Sorted(**{**fields, "space": tuple(fields["space"])}, subnets=rows)
            SubNetSpace.of(found.space)
        except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
            raise UserError(f"{path} is no {SORTED_JSON} ({error}). Train again, or get the file again.") from error
        return found

    def write(self, contents: Sorted) -> None:
        """Complete or not at all: readers never see half a file."""
        _write_json(self.model / SORTED_JSON, asdict(contents))

    def table(self) -> tuple[Measured, ...]:
        """The measured sub-networks. Raises: UserError before the first evaluation."""
        rows = self.read().subnets
        if not rows:
            raise UserError(f"{self.root} has no measured sub-networks. Run `sorted-ds eval {self.root}` first.")
        return rows

    def add_measured(self, rows: Sequence[Measured], unigram_nats: float) -> tuple[Measured, ...]:
        """Puts rows into the table in sorted.json and subnets.json, and returns the whole table in the space's order.

        Rows from before are kept where they were measured on as many targets; others cannot be compared.
        """
        contents = self.read()
        kept = [row for row in contents.subnets if row.num_targets == rows[0].num_targets]
        by_name = {row.subnet: row for row in [*kept, *rows]}
        table = tuple(by_name[name] for name in contents.space if name in by_name)
        self.write(replace(contents, subnets=table, unigram_nats=unigram_nats))
        fields = {"unigram_nats": unigram_nats, "subnets": [asdict(row) for row in table]}
        _write_json(self.root / SUBNETS_JSON, fields)
        return table


def _write_json(path: Path, fields: dict[str, object]) -> None:
    hidden = path.with_name(f".writing_{path.name}")
    hidden.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    hidden.replace(path)
