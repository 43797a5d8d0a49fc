"""Writes run.json at the start of a run, and the trained model with its measured table at the end.

In: a run, its model's config, its data and the engine. On disk, beside the checkpoints and curves:

    RUN_DIR/run.json   the run file with all defaults, DeepSpeed's complete config, versions and commit
    RUN_DIR/model/     the full network as an ordinary Hugging Face directory, and sorted.json (model_dir.py)
"""

import hashlib
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig

import sorted_ds
from sorted_ds.base.errors import UserError
from sorted_ds.base.files import remove_unfinished, replaced, share
from sorted_ds.checkpoint import Checkpoints
from sorted_ds.checkpoint.branch import CHECKPOINTS_FOLDER, Origin
from sorted_ds.checkpoint.folders import checkpoint_name, published_checkpoints
from sorted_ds.checkpoint.identity import LAYER_ORDER, MODEL, Identity, flat, with_current_keys
from sorted_ds.checkpoint.index import checkpoint_fingerprint
from sorted_ds.cluster.ranks import Ranks
from sorted_ds.deploy.evaluate import baseline_of, save_table
from sorted_ds.deploy.family import stored_dtype
from sorted_ds.deploy.license import base_of, copy_license_files
from sorted_ds.deploy.model_dir import (
    FROM_RUN_DIR,
    MODEL_FOLDER,
    PARETO_PNG,
    SUBNETS_JSON,
    TOKENS_DIR,
    Base,
    Measured,
    ModelDir,
    Sorted,
)
from sorted_ds.engine import Engine
from sorted_ds.nested import NestedModel, save_full
from sorted_ds.run.config import Run
from sorted_ds.run.model_config import layer_order_of, source_of
from sorted_ds.run.run_file import load_engine_config
from sorted_ds.space import SubNetSpace
from sorted_ds.tasks import Prepared, Task

RUN_JSON = "run.json"
PACKAGE = Path(sorted_ds.__file__).parent
IDENTITY_KEYS = (
    "seed",
    "task",
    "space.",
    "sampling.",
    "batch.step_rows",
    "batch.row_tokens",
    "batch.isolate",
    "optim.name",
)
"""Sections and keys of the run file that are part of a run's identity. A run that changes one cannot resume."""
NOT_THE_MODEL = ("transformers_version", "dtype", "use_cache", "architectures", "_name_or_path")
"""Keys of a Hugging Face config that do not describe the network."""
PACKAGES = ("sorted-ds", "torch", "deepspeed", "transformers", "tokenizers", "safetensors")
"""The packages whose versions are recorded, and compared between ranks."""


@dataclass(frozen=True)
class RunDir:
    """The directory of one run."""

    run: Run
    config: PreTrainedConfig
    task: Task
    data: Prepared
    ranks: Ranks
    heartbeat: Callable[[], None]
    """Called while work makes progress."""

    @property
    def baseline(self) -> Mapping[str, float] | None:
        """The name and the loss of the task's baseline, if it has one."""
        return baseline_of(self.task, self.data)

    def checkpoints(self) -> Checkpoints:
        """Returns the checkpoints in RUN_DIR, which must have this run's identity."""
        settings = self.run.checkpoint
        return Checkpoints(
            self._checkpoints_folder,
            settings.keep_last,
            identity_of(self.run, self.config, self.data.key),
            self.ranks,
            settings.asynchronous,
            settings.strict,
            self.heartbeat,
            settings.keep_steps,
        )

    def branch_off(self) -> None:
        """Puts the checkpoint of `checkpoint.branch` into RUN_DIR, if that has none. Every rank must call this.

        Raises: AgreedError when it cannot be used.
        """
        origin = self.run.checkpoint.branch
        with self.ranks.fail_together():
            if origin and self.ranks.is_first and not published_checkpoints(self._checkpoints_folder):
                identity = identity_of(self.run, self.config, self.data.key)
                Origin.parse(origin).branch(self._checkpoints_folder, identity)

    @property
    def _checkpoints_folder(self) -> Path:
        return self.run.run_dir / CHECKPOINTS_FOLDER

    @property
    def _model_folder(self) -> Path:
        return self.run.run_dir / MODEL_FOLDER

    def write_run_json(self, engine_config: Mapping, deepspeed_config: Mapping) -> list[str]:
        """Writes run.json. Returns, on rank 0, what has changed since the last start. Every rank must call this."""
        path = self.run.run_dir / RUN_JSON
        with self.ranks.fail_together():
            run = {**self.run.model_dump(mode="json"), self.run.engine.deepspeed.name: engine_config}
            changes = _changes(path, run) if self.ranks.is_first else []
            if self.ranks.is_first:
                contents = {
                    "run": run,
                    "deepspeed": deepspeed_config,
                    "num_ranks": self.ranks.size,
                    "identity": identity_of(self.run, self.config, self.data.key).facts,
                    "versions": versions(),
                    "commit": _commit(),
                }
                with replaced(path) as hidden:
                    hidden.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
        return changes

    def names_measured_before(self, engine: Engine, num_targets: int) -> set[str] | None:
        """Returns the names of the sub-networks that RUN_DIR/model has measured on `num_targets` validation targets.

        Returns None if there is no saved model, or if it belongs to an older checkpoint, to other settings or was saved
        in another precision. Every rank must call this.
        """
        found = self._names_measured_before(engine, num_targets) if self.ranks.is_first else None
        names = json.loads(self.ranks.gather(json.dumps(found))[0])
        return None if names is None else set(names)

    def _names_measured_before(self, engine: Engine, num_targets: int) -> list[str] | None:
        where = ModelDir(self.run.run_dir, self._model_folder)
        try:
            found, expected = where.read(), self._sorted(engine.model.space)
            same, wanted = (
                (each.checkpoint, each.space, each.sub_networks.layer_order, each.row_tokens, each.task)
                for each in (found, expected)
            )
            if (*same, stored_dtype(where)) != (*wanted, engine.model.dtype):
                return None
            # The data may have moved. Rows measured on other targets stay until add_measured replaces them.
            table = replace(expected, subnets=found.subnets, baseline=found.baseline)
            where.write(replace(table, measured_on=found.measured_on))
        except (OSError, UserError):
            return None
        return [row.subnet for row in found.subnets if row.num_targets == num_targets]

    def write_model(self, engine: Engine) -> None:
        """Writes RUN_DIR/model in the training precision, complete or not at all. Every rank must call this.

        Raises: AgreedError when rank 0 cannot write it.
        """
        weights = self._in_step(engine.weights())
        with self.ranks.fail_together():
            try:
                if self.ranks.is_first:
                    self._write_model(engine.model, weights)
            finally:
                deque(weights, maxlen=0)  # all ranks gather each weight, so rank 0 must too, even if it cannot write

    def _write_model(self, model: NestedModel, weights: Iterable[tuple[str, Tensor]]) -> None:
        remove_unfinished(self.run.run_dir, MODEL_FOLDER)
        try:
            with replaced(self._model_folder, durable=True) as hidden:
                save_full(model, weights, hidden)
                self.task.write_processor(self.data, hidden)
                if (source := source_of(self.run)) is not None:
                    copy_license_files(source, hidden, self._base())
                ModelDir(self.run.run_dir, hidden).write(self._sorted(model.space))
                share(hidden)
            for name in (SUBNETS_JSON, PARETO_PNG):  # left by an earlier model
                (self.run.run_dir / name).unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self._model_folder} could not be written: {error}. Free the space, and start the run again."
            ) from error

    def _sorted(self, space: SubNetSpace) -> Sorted:
        """Returns the contents of sorted.json for the model of the last step."""
        folder = self.data.folder
        return Sorted(
            space=tuple(subnet.name for subnet in space),
            data={TOKENS_DIR: str(folder), FROM_RUN_DIR: os.path.relpath(folder, self.run.run_dir)},
            row_tokens=self.run.batch.row_tokens,
            eval_rows=self.run.eval.rows,
            isolate=self.run.batch.isolate,
            task=self.run.task,
            layer_order=space.layer_order,
            base=self._base(),
            checkpoint=checkpoint_fingerprint(self._checkpoints_folder / checkpoint_name(self.run.train.steps)),
        )

    def _base(self) -> Base | None:
        """Returns what training began with, and the license of that."""
        init = self.run.model.init
        return base_of(source_of(self.run), None if Path(init).is_dir() else init)

    def _in_step(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yields the weights on all ranks at the speed of rank 0, which writes them.

        A rank that has nothing to gather would otherwise wait at the end for so long that it seems to hang.
        """
        for weight in weights:
            self.ranks.sum([0.0])
            self.heartbeat()
            yield weight

    def add_to_table(self, measured: Sequence[Measured]) -> tuple[Measured, ...]:
        """Writes the measured table and its figure; returns the whole table on rank 0. Every rank must call this."""
        table: tuple[Measured, ...] = ()
        with self.ranks.fail_together():
            if self.ranks.is_first:
                where = ModelDir.find(self.run.run_dir)
                # Without new rows the figure is drawn too: an earlier start may have been killed before it drew it.
                if rows := measured or where.read().subnets:
                    table = save_table(where, rows, self.task, self.data)
        return table


def identity_of(run: Run, config: PreTrainedConfig, data_key: str) -> Identity:
    """Returns what a checkpoint must have in common with the run: keys of the run file, model config and data."""
    keys = flat(run.model_dump(mode="json"))
    model = flat({key: value for key, value in config.to_dict().items() if key not in NOT_THE_MODEL})
    facts = {key: value for key, value in keys.items() if key.startswith(IDENTITY_KEYS)}
    facts |= {f"{MODEL}{key}": value for key, value in model.items()}
    if run.data.sources:
        facts["data.weights"] = json.dumps(run.data.weights_by_step)
    facts[LAYER_ORDER] = json.dumps(layer_order_of(run))
    return Identity({**facts, "data": data_key}, run.checkpoint.extend_space)


def require_step(step: int, num_steps: int, folder: Path) -> None:
    """Raises UserError when the checkpoint in `folder` is beyond the last step of the run."""
    if step > num_steps:
        raise UserError(
            f"train.steps = {num_steps}, but {folder} has a checkpoint of step {step}. Set train.steps to {step} or "
            "more, or set another run_dir."
        )


def versions() -> dict[str, str]:
    """Returns the versions of this package, of the packages that it computes with, and of Python."""
    return {name: version(name) for name in PACKAGES} | {"python": sys.version.split()[0]}


def facts_to_compare(run: Run) -> dict[str, str]:
    """Returns what must be the same on every rank: the run file, DeepSpeed's settings, versions and code."""
    engine = load_engine_config(run.engine.deepspeed)
    return {
        **flat(run.model_dump(mode="json")),
        **flat({"deepspeed": engine}),
        **versions(),
        "code": code_digest(),
    }


def code_digest() -> str:
    """Returns a digest of this package's Python files."""
    return digest_of(PACKAGE.rglob("*.py"))


def digest_of(files: Iterable[Path]) -> str:
    """Returns a digest of the files' contents, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _changes(path: Path, run: Mapping) -> list[str]:
    """Returns a line like `optim.learning_rate: 0.001 before, 0.0005 now` for each key that has changed.

    `path`: run.json of the last start. At the first start there is none, and the list is empty.
    """
    if not path.is_file():
        return []
    try:
        before = with_current_keys(flat(json.loads(path.read_text(encoding="utf-8"))["run"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{path} could not be read, so the changes of the run file are unknown"]
    return list(_differences(before, flat(run)))


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield f"{key}: {before.get(key, 'not set')} before, {now.get(key, 'not set')} now"


def _commit() -> str:
    """Returns the commit of the code if it runs from a git repository, otherwise an empty string."""
    command = ["git", "-C", str(PACKAGE), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
