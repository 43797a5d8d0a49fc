"""Starts a run from a checkpoint of another one, with its weights, its optimizer state and its step number.

In: the other run's checkpoint. On disk: a checkpoint of the new run with the same files, which are linked where the
file system can and copied elsewhere. The new run then resumes from it as from its own. Neither run changes the other's
files, because a checkpoint's files are never written again.
"""

import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from sorted_ds.base.errors import UserError
from sorted_ds.base.files import move_over
from sorted_ds.checkpoint.folders import checkpoint_name, published_checkpoints, writing_folder
from sorted_ds.checkpoint.identity import Identity
from sorted_ds.checkpoint.index import DamagedError, Index

CHECKPOINTS_FOLDER = "checkpoints"
"""The folder of the checkpoints in RUN_DIR."""


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run branches off from."""

    checkpoint: Path

    @classmethod
    def parse(cls, text: str) -> "Origin":
        """Returns the checkpoint that `RUN_DIR@STEP` names. Raises: UserError if it does not exist."""
        run_dir, at, step = text.rpartition("@")
        if not at or not run_dir or not re.fullmatch(r"\d+", step):
            raise UserError(f"checkpoint.branch = {text!r} should be RUN_DIR@STEP, like runs/a@4000.")
        folder = Path(run_dir) / CHECKPOINTS_FOLDER
        if not (checkpoint := folder / checkpoint_name(int(step))).is_dir():
            found = [str(int(path.name.split("_")[1])) for path in published_checkpoints(folder)]
            there = f"It has {', '.join(found)}" if found else "It has none"
            raise UserError(
                f"checkpoint.branch = {text!r}, but {folder} has no checkpoint of step {step}. {there}; a run keeps "
                "those that its checkpoint.keep_steps names."
            )
        return cls(checkpoint)

    def index(self, identity: Identity) -> Index:
        """Returns the checkpoint's index. Raises: UserError if it is damaged, or the new run has another model."""
        try:
            index = Index.read(self.checkpoint)
            index.check_sizes(self.checkpoint)
        except DamagedError as error:
            raise UserError(f"checkpoint.branch: {error}. Name another step.") from None
        identity.check_branch(index.identity, self.checkpoint)
        return index

    def branch(self, folder: Path, identity: Identity) -> None:
        """Puts the checkpoint into `folder`, the new run's checkpoints, complete or not at all.

        Raises: UserError as `index` does, and when the files cannot be written.
        """
        index = self.index(identity)
        target = folder / self.checkpoint.name
        hidden = writing_folder(target, str(os.getpid()))
        try:
            hidden.mkdir(parents=True)
            for name in index.files:
                link_or_copy(self.checkpoint / name, hidden / name)
            replace(index, identity=dict(identity.facts)).write(hidden)
            move_over(hidden, target)
        except OSError as error:
            shutil.rmtree(hidden, ignore_errors=True)
            advice = "Free the space, and start the run again."
            raise UserError(f"{target} could not be written: {error}. {advice}") from error


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` a second name of the file, or a copy on another file system. Raises: OSError."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
