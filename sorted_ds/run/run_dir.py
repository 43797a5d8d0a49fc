"""What training writes into RUN_DIR beside checkpoints and curves: run.json, and at the end the trained model.

RUN_DIR/run.json         the resolved run file, DeepSpeed's whole dictionary, versions and commit
RUN_DIR/model/           the full network as an ordinary Hugging Face directory, and sorted.json (model_dir.py)
"""

import hashlib
import json
import os
import shutil
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
from sorted_ds.base.files import share, sync
from sorted_ds.checkpoint import Checkpoints
from sorted_ds.checkpoint.identity import MODEL, Identity, flat, with_current_keys
from sorted_ds.checkpoint.index import fingerprint, name_of
from sorted_ds.cluster.ranks import Ranks
from sorted_ds.deploy.evaluate import save, stored_dtype
from sorted_ds.deploy.model_dir import PARETO_PNG, SUBNETS_JSON, Measured, ModelDir, Sorted
from sorted_ds.engine import Engine
from sorted_ds.nested import NestedModel, save_full
from sorted_ds.run.config import Run
from sorted_ds.run.run_file import load_engine_config
from sorted_ds.space import SubNetSpace
from sorted_ds.tasks import Prepared, Task

RUN_JSON = "run.json"
PACKAGE = Path(sorted_ds.__file__).parent
IDENTITY_KEYS = ("seed", "task", "space.", "sampling.", "batch.step_rows", "batch.row_tokens", "optim.name")
"""Sections and keys that a run cannot change and still be the same run."""
NOT_THE_MODEL = ("transformers_version", "dtype", "use_cache", "architectures", "_name_or_path")
"""Keys of a Hugging Face config that say nothing about the network."""
PACKAGES = ("sorted-ds", "torch", "deepspeed", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True)
class RunDir:
    """The directory of one run."""

    run: Run
    config: PreTrainedConfig
    task: Task
    data: Prepared
    ranks: Ranks
    beat: Callable[[], None]
    """Called as long as something moves."""

    @property
    def baseline(self) -> Mapping[str, float] | None:
        """Name and loss of something trivial to compare with."""
        trivial = self.task.baseline(self.data)
        return None if trivial is None else {trivial.name: trivial.loss}

    def checkpoints(self) -> Checkpoints:
        """RUN_DIR/checkpoints, of this run alone."""
        settings = self.run.checkpoint
        folder, identity = self.run.run_dir / "checkpoints", identity_of(self.run, self.config, self.data.key)
        how = (settings.asynchronous, settings.strict, self.beat)
        return Checkpoints(folder, settings.keep_last, identity, self.ranks, *how)

    def open(self, engine_config: Mapping, deepspeed_config: Mapping) -> list[str]:
        """Writes run.json, and returns what the run says otherwise than at the last start. A collective."""
        path = self.run.run_dir / RUN_JSON
        with self.ranks.together():
            run = {**self.run.model_dump(mode="json"), self.run.engine.deepspeed.name: engine_config}
            changes = _changes(path, run) if self.ranks.is_first else []
            if self.ranks.is_first:
                path.parent.mkdir(parents=True, exist_ok=True)
                contents = {
                    "run": run,
                    "deepspeed": deepspeed_config,
                    "num_ranks": self.ranks.size,
                    "identity": identity_of(self.run, self.config, self.data.key).facts,
                    "versions": versions(),
                    "commit": _commit(),
                }
                path.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
        return changes

    def measured(self, engine: Engine, num_targets: int) -> set[str] | None:
        """The sub-networks that RUN_DIR/model has measured on so many targets. A collective.

        None where that is not of the last checkpoint, or in another precision.
        """
        found = self._measured(engine, num_targets) if self.ranks.is_first else None
        told = json.loads(self.ranks.gather(json.dumps(found))[0])
        return None if told is None else set(told)

    def _measured(self, engine: Engine, num_targets: int) -> list[str] | None:
        where = ModelDir(self.run.run_dir, self.run.run_dir / "model")
        try:
            found, expected = where.read(), self._sorted(engine.model.space)
            same, wanted = (
                (each.checkpoint, each.space, each.sub_networks.layer_order, each.row_tokens, each.task)
                for each in (found, expected)
            )
            if (*same, stored_dtype(where)) != (*wanted, engine.model.dtype):
                return None
            # The data may have moved. Rows of other targets go when the first of these comes (ModelDir.add_measured).
            where.write(replace(expected, subnets=found.subnets, baseline=found.baseline))
        except (OSError, UserError):
            return None
        return [row.subnet for row in found.subnets if row.num_targets == num_targets]

    def write_model(self, engine: Engine) -> None:
        """RUN_DIR/model in the training precision, complete or not at all. A collective."""
        weights = self._moving(engine.weights())
        with self.ranks.together():
            try:
                if self.ranks.is_first:
                    self._write_model(engine.model, weights)
            finally:
                deque(weights, maxlen=0)  # each is gathered by all ranks, whatever becomes of it on rank 0

    def _write_model(self, model: NestedModel, weights: Iterable[tuple[str, Tensor]]) -> None:
        final, hidden = self.run.run_dir / "model", self.run.run_dir / ".writing_model"
        shutil.rmtree(hidden, ignore_errors=True)
        try:
            save_full(model, weights, hidden)
            self.task.write_processor(self.data, hidden)
            ModelDir(self.run.run_dir, hidden).write(self._sorted(model.space))
            share(hidden)
            for path in (*hidden.iterdir(), hidden):
                sync(path)
            shutil.rmtree(final, ignore_errors=True)
            hidden.rename(final)
            for name in (SUBNETS_JSON, PARETO_PNG):  # of other weights
                (self.run.run_dir / name).unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{final} could not be written: {error}. Free the space, and start the run again."
            ) from error
        finally:
            shutil.rmtree(hidden, ignore_errors=True)

    def _sorted(self, space: SubNetSpace) -> Sorted:
        folder = self.data.folder
        data = {"tokens_dir": str(folder), "from_run_dir": os.path.relpath(folder, self.run.run_dir)}
        names = tuple(subnet.name for subnet in space)
        return Sorted(
            names,
            data,
            row_tokens=self.run.batch.row_tokens,
            eval_rows=self.run.eval.rows,
            task=self.run.task,
            layer_order=space.layer_order,
            checkpoint=fingerprint(self.run.run_dir / "checkpoints" / name_of(self.run.train.steps)),
        )

    def _moving(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """None is further than rank 0, which writes them: those that have nothing to gather would seem to hang."""
        for weight in weights:
            self.ranks.sum([0.0])
            self.beat()
            yield weight

    def add_to_table(self, measured: Sequence[Measured]) -> tuple[Measured, ...]:
        """The measured table and its figure. Returns the whole table, on rank 0. A collective."""
        table: tuple[Measured, ...] = ()
        with self.ranks.together():
            if self.ranks.is_first:
                where = ModelDir.find(self.run.run_dir)
                if rows := measured or where.read().subnets:  # an earlier start may have ended before the figure
                    table = save(where, rows, self.task, self.data).measured
        return table


def identity_of(run: Run, config: PreTrainedConfig, data_key: str) -> Identity:
    """What makes a run this run: keys of its run file, its model's config and its data."""
    keys = flat(run.model_dump(mode="json"))
    model = flat({key: value for key, value in config.to_dict().items() if key not in NOT_THE_MODEL})
    facts = {key: value for key, value in keys.items() if key.startswith(IDENTITY_KEYS)}
    facts |= {f"{MODEL}{key}": value for key, value in model.items()}
    return Identity({**facts, "data": data_key}, run.checkpoint.extend_space)


def versions() -> dict[str, str]:
    """Of this package, of those that it computes with, and of Python."""
    return {name: version(name) for name in PACKAGES} | {"python": sys.version.split()[0]}


def facts(run: Run) -> dict[str, str]:
    """What every rank must have alike: the run, DeepSpeed's settings, versions and code."""
    engine = load_engine_config(run.engine.deepspeed)
    return {
        **flat(run.model_dump(mode="json")),
        **flat({"deepspeed": engine}),
        **versions(),
        "code": code_digest(),
    }


def code_digest() -> str:
    """Of this package."""
    return digest_of(PACKAGE.rglob("*.py"))


def digest_of(files: Iterable[Path]) -> str:
    """Of their contents, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _changes(path: Path, run: Mapping) -> list[str]:
    """`optim.learning_rate: 0.001 before, 0.0005 now`, for each key. None at the first start."""
    if not path.is_file():
        return []
    try:
        before = with_current_keys(flat(json.loads(path.read_text(encoding="utf-8"))["run"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{path} could not be read, so changes of the run file are not listed"]
    return list(_differences(before, flat(run)))


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield f"{key}: {before.get(key, 'not set')} before, {now.get(key, 'not set')} now"


def _commit() -> str:
    """The commit of the code, where it runs from a repository; else empty."""
    command = ["git", "-C", str(PACKAGE), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
