"""Reads and writes what a trained model's directory holds beside Hugging Face's own files.

In: a directory, and measured sub-networks. Out: the space, the settings and the measured table. On disk:

    RUN_DIR/model/              the full network as an ordinary Hugging Face directory
    RUN_DIR/model/sorted.json   the space, the data it was trained on, and the measured table
    RUN_DIR/subnets.json        the measured table alone
    RUN_DIR/pareto.png          the table as a figure

Training writes sorted.json, and evaluation writes the table. Selection and export read them. This module does not
import torch, so `sorted-ds select` is quick.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sorted_ds.base.errors import UserError
from sorted_ds.base.files import replaced
from sorted_ds.base.names import LOSS
from sorted_ds.deploy.score import Score, merged_scores
from sorted_ds.deploy.speed import MeasuredOn, Setting, Speed, merged
from sorted_ds.space import SubNet, SubNetSpace

MODEL_FOLDER = "model"
SORTED_JSON = "sorted.json"
SUBNETS_JSON = "subnets.json"
PARETO_PNG = "pareto.png"
TOKENS_DIR, FROM_RUN_DIR = "tokens_dir", "from_run_dir"
"""Keys of `Sorted.data`: the absolute path of the prepared data, and its path relative to the run's directory."""


TRAINED_FROM, SCRATCH, CHECKPOINT = "trained_from", "scratch", "checkpoint"
"""The key of `Sorted.base` that is always there, and its two values."""
Base = Mapping[str, str | list[str]]
"""What a network was trained from, and the license of that (`Sorted.base`)."""


@dataclass(frozen=True)
class Measured:
    """The metrics of one sub-network on the validation rows, and its costs."""

    subnet: str
    metrics: dict[str, float]
    """The task's metrics by name. In JSON they stand beside the other fields."""
    num_targets: int
    parameters: int
    non_embedding_parameters: int
    flops_per_token: int
    kv_bytes_per_token: int
    is_trained: bool = True
    """Whether the sub-network is in the space. In JSON the key is only there if it is not."""
    speeds: tuple[Speed, ...] = ()
    """For each batch size and context that was measured. In JSON the key is only there if there are any."""
    scores: tuple[Score, ...] = ()
    """For each metric of each task of lm_eval that was run. In JSON the key is only there if there are any."""

    @property
    def loss(self) -> float:
        """The mean loss in nats per target, which every task has."""
        return self.metrics[LOSS]

    def speed(self, setting: Setting) -> Speed | None:
        """Returns the speed for a batch size and a context, or None if it was not measured."""
        return next((speed for speed in self.speeds if speed.setting == setting), None)

    def to_json(self) -> dict[str, object]:
        """Returns the fields of the row in subnets.json and sorted.json."""
        costs = {name: getattr(self, name) for name in COSTS}
        trained = {} if self.is_trained else {IS_TRAINED: False}
        speeds = {SPEEDS: [speed.to_json() for speed in self.speeds]} if self.speeds else {}
        scores = {SCORES: [score.to_json() for score in self.scores]} if self.scores else {}
        return {"subnet": self.subnet, **self.metrics, **costs, **trained, **speeds, **scores}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Measured":
        """Returns the row that `to_json` wrote.

        Raises: KeyError when a field is missing, TypeError or ValueError for a value that it cannot have.
        """
        own = {name: row[name] for name in ("subnet", *COSTS)}
        metrics = {key: row[key] for key in (LOSS, *row) if key not in (*own, *OPTIONAL)}
        if not _are_numbers(metrics.values()):
            raise ValueError(f"the metrics of {row['subnet']} are {metrics}")
        speeds = tuple(Speed.from_json(speed) for speed in row.get(SPEEDS, ()))
        scores = tuple(Score.from_json(score) for score in row.get(SCORES, ()))
        return cls(metrics=metrics, is_trained=row.get(IS_TRAINED, True), speeds=speeds, scores=scores, **own)


COSTS = tuple(field.name for field in fields(Measured) if field.type is int)
"""The fields of a row that count something."""
OPTIONAL = IS_TRAINED, SPEEDS, SCORES = "is_trained", "speeds", "scores"
"""The keys of a row in JSON that may be missing."""


@dataclass(frozen=True)
class Sorted:
    """The contents of sorted.json."""

    space: tuple[str, ...]
    """The names of the sub-networks, in ascending order of parameters."""
    data: Mapping[str, object]
    """Where the prepared data is, by the keys `tokens_dir` and `from_run_dir`."""
    row_tokens: int
    eval_rows: int
    """The largest number of validation rows that an evaluation uses."""
    isolate: bool = False
    """Whether the documents of a row are isolated from each other."""
    task: str = "causal_lm"
    """The name of the task that the network was trained for."""
    layer_order: tuple[int, ...] | None = None
    """The order in which a depth takes the layers; None for the network's own sequence."""
    checkpoint: str | None = None
    """The fingerprint of the checkpoint that the weights are from; None in files of earlier versions."""
    base: Base | None = None
    """What the network was trained from; None if that is not known, as in files of earlier versions.

    `trained_from` is "scratch" or "checkpoint". For a checkpoint the other keys are those of its model card's header
    that state its license: `license`, which may be a list, `license_name` and `license_link`; and `base_model`, its
    name on the hub. A checkpoint without a license has none of them."""
    subnets: tuple[Measured, ...] = ()
    """The measured table, which is empty before the first evaluation."""
    baseline: Mapping[str, float] | None = None
    """The name and the validation loss of the task's baseline. The evaluation writes it with the table."""
    measured_on: MeasuredOn | None = None
    """Where the speeds in the table were measured; None before `sorted-ds eval --measure`."""

    @property
    def sub_networks(self) -> SubNetSpace:
        """The space as an object. Raises: UserError when the names or the layer order are not valid."""
        return SubNetSpace.of(self.space, self.layer_order)


@dataclass(frozen=True)
class ModelDir:
    """The directory of a trained model."""

    root: Path
    """The folder of the table and the figure."""
    model: Path
    """The folder of the Hugging Face files and sorted.json."""

    @classmethod
    def find(cls, folder: Path) -> "ModelDir":
        """Returns the model of a run's directory, or of a model directory. Raises: UserError for any other folder."""
        for found in (cls(folder, folder / MODEL_FOLDER), cls(folder, folder)):
            if (found.model / SORTED_JSON).is_file():
                return found
        if not folder.is_dir():
            raise UserError(f"{folder} is not a directory. Name a run's directory, or the model directory in it.")
        raise UserError(
            f"{folder} has no {SORTED_JSON}, and no {MODEL_FOLDER}/{SORTED_JSON}. Name the directory of a run whose "
            "training has ended."
        )

    def read(self) -> Sorted:
        """Returns the contents of sorted.json. Raises: UserError when it is damaged."""
        path = self.model / SORTED_JSON
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
            if "space" not in contents and "sorted" in contents:
                raise ValueError("`sorted-ds sort` wrote it, and the model is not trained yet")
            rows = tuple(Measured.from_json(row) for row in contents.pop("subnets", ()))
            nats = contents.pop("unigram_nats", None)  # files of earlier versions, which had no other baseline
            contents = {"baseline": None if nats is None else {"unigram model": nats}, **contents}
            order = contents.pop("layer_order", None)
            contents |= {"space": tuple(contents["space"]), "layer_order": None if order is None else tuple(order)}
            if isinstance(base := contents.get("base"), dict):  # earlier versions stated it for checkpoints alone
                contents["base"] = {TRAINED_FROM: CHECKPOINT, **base}
            if isinstance(where := contents.get("measured_on"), dict):
                contents["measured_on"] = MeasuredOn(**where)
            found = Sorted(**contents, subnets=rows)
            _check(found)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError) as error:
            raise UserError(f"{path} is not a valid {SORTED_JSON} ({error}). Train again, or copy it again.") from error
        return found

    def write(self, contents: Sorted) -> None:
        """Writes sorted.json, complete or not at all."""
        rows = [row.to_json() for row in contents.subnets]
        _write_json(self.model / SORTED_JSON, {**asdict(contents), "subnets": rows})

    def read_measured(self, setting: Setting | None = None) -> Sorted:
        """Returns the contents of sorted.json with a measured table; with `setting`, a table that has speeds for it.

        Raises: UserError if the table, or these speeds, are not there yet.
        """
        contents = self.read()
        if not contents.subnets:
            raise UserError(f"{self.root} has no measured sub-networks. Run `sorted-ds eval {self.root}` first.")
        known = {speed.setting for row in contents.subnets for speed in row.speeds}
        if setting is not None and not known:
            raise UserError(f"{self.root} has no measured speeds. Run `sorted-ds eval {self.root} --measure` first.")
        if setting is not None and setting not in known:
            raise UserError(
                f"{self.root} has no speeds for {setting}, but for {'; '.join(map(str, sorted(known)))}. Name one of "
                f"these with --batch and --context, or run `sorted-ds eval {self.root} --measure --batch "
                f"{setting.batch} --context {setting.context}`."
            )
        return contents

    def table(self) -> tuple[Measured, ...]:
        """Returns the measured table. Raises: UserError before the first evaluation."""
        return self.read_measured().subnets

    def add_measured(self, rows: Sequence[Measured], baseline: Mapping[str, float] | None) -> tuple[Measured, ...]:
        """Adds rows to the table in sorted.json and subnets.json. Returns the whole table, ascending in parameters.

        Earlier rows that were measured on another number of targets are removed, because they cannot be compared. The
        speeds and the scores of an earlier row stay.
        """
        contents = self.read()
        earlier = {row.subnet: row for row in contents.subnets}
        new = [_with_what_stays(row, earlier.get(row.subnet, row)) for row in rows]
        kept = [row for row in contents.subnets if row.num_targets == rows[0].num_targets]
        return self._write_table(replace(contents, baseline=baseline), [*kept, *new])

    def add_speeds(self, speeds: Mapping[str, Sequence[Speed]], measured_on: MeasuredOn) -> tuple[Measured, ...]:
        """Adds speeds to the rows of the table, by the sub-networks' names. Returns the whole table.

        Earlier speeds that were measured elsewhere are removed, because they cannot be compared.
        """
        contents = self.read()
        is_same = contents.measured_on == measured_on
        rows = [
            replace(row, speeds=merged(row.speeds if is_same else (), speeds.get(row.subnet, ())))
            for row in contents.subnets
        ]
        return self._write_table(replace(contents, measured_on=measured_on), rows)

    def add_scores(self, scores: Mapping[str, Sequence[Score]]) -> tuple[Measured, ...]:
        """Adds scores to the rows of the table, by the sub-networks' names. Returns the whole table.

        Earlier scores of the same tasks that cannot be compared with them are removed.
        """
        contents = self.read()
        terms = {score.task: score.terms for each in scores.values() for score in each}
        rows = [
            replace(row, scores=merged_scores(row.scores, scores.get(row.subnet, ()), terms))
            for row in contents.subnets
        ]
        return self._write_table(contents, rows)

    def _write_table(self, contents: Sorted, rows: Iterable[Measured]) -> tuple[Measured, ...]:
        """Writes sorted.json and subnets.json. If a sub-network has two rows, the later one stays."""
        by_name = {row.subnet: row for row in rows}
        table = tuple(sorted(by_name.values(), key=lambda row: (row.parameters, SubNet.parse(row.subnet))))
        self.write(replace(contents, subnets=table))
        where = {} if contents.measured_on is None else {"measured_on": asdict(contents.measured_on)}
        rows_in_json = [row.to_json() for row in table]
        _write_json(self.root / SUBNETS_JSON, {"baseline": contents.baseline, **where, "subnets": rows_in_json})
        return table


def _with_what_stays(row: Measured, earlier: Measured) -> Measured:
    """Returns the row with the speeds and the scores of an earlier row of the same sub-network."""
    return replace(row, speeds=merged(earlier.speeds, row.speeds), scores=earlier.scores)


def _check(found: Sorted) -> None:
    """Raises: TypeError, ValueError or UserError when a field has a value that it cannot have."""
    space = found.sub_networks
    for row in found.subnets:
        _check_row(row, space)
    if found.base is not None:
        _check_base(found.base)
    is_valid = {
        "data": isinstance(found.data, Mapping),
        "row_tokens": isinstance(found.row_tokens, int) and found.row_tokens > 0,
        "eval_rows": isinstance(found.eval_rows, int) and found.eval_rows > 0,
        "task": isinstance(found.task, str),
        "baseline": found.baseline is None or _are_numbers(found.baseline.values()),
        "measured_on": isinstance(found.measured_on, MeasuredOn | None),
    }
    for name, valid in is_valid.items():
        if not valid:
            raise ValueError(f"{name} is {getattr(found, name)!r}")


def _check_row(row: Measured, space: SubNetSpace) -> None:
    """Raises: ValueError or UserError."""
    subnet = SubNet.parse(row.subnet)
    if subnet.axes != space.axes or not subnet.is_within(space.full):
        raise ValueError(f"{row.subnet} is not a part of {space.full}")
    if row.is_trained != (subnet in space):
        raise ValueError(f"{row.subnet} says {IS_TRAINED} = {row.is_trained}, which the space contradicts")
    if not all(isinstance(getattr(row, name), int) for name in COSTS):
        raise ValueError(f"the costs of {row.subnet} are not whole numbers")


def _are_numbers(values: Iterable[object]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _check_base(base: Base) -> None:
    """Raises: TypeError or ValueError."""
    if not isinstance(base, Mapping):
        raise TypeError(f"base is {base!r}")
    for key, value in base.items():
        if not all(isinstance(text, str) for text in (value if isinstance(value, list) else [value])):
            raise TypeError(f"base.{key} is {value!r}")
    if base.get(TRAINED_FROM) not in (SCRATCH, CHECKPOINT):
        raise ValueError(f"base.{TRAINED_FROM} is {base.get(TRAINED_FROM)!r}")


def _write_json(path: Path, fields: dict[str, object]) -> None:
    with replaced(path) as hidden:
        hidden.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
