"""The checkpoints of a run: saved while training goes on, complete or invisible, and found again.

    RUN_DIR/checkpoints/step_00000200/
        rank_0000.safetensors ...   fp32 master weights and optimizer state, each rank's own (shard_files.py)
        checkpoint.json             step, the run's identity, size and sha256 of each file (index.py)

A save has two halves. Each rank copies its shards aside, and training goes on while a thread writes and syncs them into
a hidden folder; when all have told that they are done, rank 0's thread adds checkpoint.json and renames the folder. So
a run that is killed leaves either the whole checkpoint or none. Ranks tell each other within the sum that begins each
step (`is_ready`): the threads need no word of their own. The step is the only cursor: rows, samples and learning rate
follow from it. Nothing is pickled.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from sorted_ds.base.errors import AgreedError
from sorted_ds.base.files import sync
from sorted_ds.checkpoint.background import Staging, Task, wait_for_all
from sorted_ds.checkpoint.finding import complete_ones, newest_whole
from sorted_ds.checkpoint.identity import Identity
from sorted_ds.checkpoint.index import Index, name_of, see_all
from sorted_ds.checkpoint.shard_files import Sharded, file_of, fill, state_keys_of, tensors_of, write_file
from sorted_ds.checkpoint.waiting import wait_for
from sorted_ds.cluster.ranks import Ranks

FAILURES_IN_A_ROW = 2
"""A disk may be full for an hour; a run that cannot save at all is not worth its GPUs."""


@dataclass(frozen=True)
class Saved:
    """What became of a save."""

    folder: Path
    step: int
    seconds: float
    """From its start until it was published."""
    pause_seconds: float
    """Of those, how long training waited."""
    error: str = ""
    """Why there is no checkpoint, if there is none."""


@dataclass
class _Save:
    """One on its way."""

    folder: Path
    hidden: Path
    step: int
    started: float
    task: Task = field(init=False)
    """Of the half that it is in."""
    pause_seconds: float = 0.0
    pieces_read: list[int] = field(default_factory=list)
    """For the checksum of this rank's file."""
    is_written: bool = False
    """By every rank; now rank 0 publishes."""


class Checkpoints:
    """Every method that says so is a collective: all ranks call it."""

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        identity: Identity,
        ranks: Ranks,
        asynchronous: bool = True,
        strict: bool = False,
        heartbeat: Callable[[], None] = lambda: None,
    ):
        """`keep_last` checkpoints are kept. `strict`: a damaged one is an error, even if the one before is whole.

        `heartbeat` is called as long as something moves.
        """
        self.folder = folder
        self.warnings: list[str] = []
        """What the user should know of how the run was restored."""
        self.last_step = 0
        """Of the newest whole checkpoint."""
        self.paused_seconds = 0.0
        """How long training has waited for saves."""
        self._seconds_to_save = 0.0
        self._keep_last, self._identity, self._ranks, self._strict = keep_last, identity, ranks, strict
        self._staging = Staging() if asynchronous else None
        self._pending: _Save | None = None
        self._heartbeat = heartbeat
        self._failures = 0

    # Saving

    def start(self, engine: Sharded, step: int) -> list[Saved]:
        """Begins to save, and returns what became of the save before: there is one at a time. A collective.

        Raises: AgreedError when saving failed twice in a row.
        """
        before, began, ranks = self.finish(), time.perf_counter(), self._ranks
        folder = self.folder / name_of(step)
        hidden = self.folder / f".writing_{folder.name}_{ranks.gather(str(os.getpid()))[0]}"  # not a dead run's
        save = _Save(folder, hidden, step, began)
        try:
            with ranks.fail_together():
                if ranks.is_first:
                    hidden.mkdir(parents=True)
                tensors = self._set_aside(tensors_of(engine))
        except AgreedError as error:
            return [*before, self._failed(save, began, str(error))]
        optimizer_steps = engine.steps_taken

        def write() -> dict:
            path = hidden / file_of(ranks.rank)
            wait_for(hidden.is_dir)
            return {
                "optimizer_steps": optimizer_steps,
                "state_keys": state_keys_of(tensors),
                "files": {path.name: write_file(path, tensors, save.pieces_read.append)},
            }

        save.task, self._pending = Task(write), save
        self._count_pause(save, began)
        return before if self._staging else [*before, *self.finish()]

    def _set_aside(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What can be written while training goes on; a synchronous save needs no copy."""
        if self._staging is not None:
            return self._staging.copy(tensors)
        return {name: value.cpu().contiguous() for name, value in tensors.items()}

    def is_ready(self) -> bool:
        """Whether this rank has done its part of the half that a save is in."""
        return self._pending is not None and self._pending.task.is_done()

    def advance(self) -> list[Saved]:
        """Call when all ranks are ready, or to wait for them: ends this half of the save. A collective.

        Returns what became of the save, when it is over. Raises: AgreedError when saving failed twice in a row.
        """
        save, began, result = self._pending, time.perf_counter(), {}
        assert save is not None
        wait_for_all(self._ranks, save.task, lambda: self._progress(save), self._heartbeat)
        try:
            with self._ranks.fail_together():
                result = save.task.result()
        except AgreedError as error:
            self._pending = None
            return [self._failed(save, began, str(error))]
        if not save.is_written:
            parts = [json.loads(text) for text in self._ranks.gather(json.dumps(result))]
            save.is_written, save.task = True, Task(self._publisher(save, parts))
            self._count_pause(save, began)
            return []
        self._pending, self._failures, self.last_step = None, 0, save.step
        self._count_pause(save, began)
        seconds = time.perf_counter() - save.started
        self._seconds_to_save = max(self._seconds_to_save, seconds)
        return [Saved(save.folder, save.step, seconds, save.pause_seconds)]

    def _progress(self, save: _Save) -> int:
        """Grows while any rank writes or reads. safetensors 0.8.0 gives a file its whole size before it fills it."""
        return len(save.pieces_read) + (_blocks_in(save.hidden) if self._ranks.is_first else 0)

    def _count_pause(self, save: _Save, began: float) -> None:
        seconds = time.perf_counter() - began
        save.pause_seconds += seconds
        self.paused_seconds += seconds

    def finish(self) -> list[Saved]:
        """Waits until no save is on its way. A collective.

        Raises: AgreedError when saving failed twice in a row.
        """
        ended = []
        while self._pending is not None:
            ended += self.advance()
        return ended

    @contextmanager
    def finished(self) -> Iterator[None]:
        """A run that ends by an error that all ranks know of still publishes what it was writing."""
        try:
            yield
        except AgreedError:
            with suppress(AgreedError):
                self.finish()
            raise

    def save(self, engine: Sharded, step: int) -> list[Saved]:
        """Saves, and waits for it. A collective.

        Raises: AgreedError when it could not be written; nothing is left but the older checkpoints.
        """
        ended = [*self.start(engine, step), *self.finish()]
        if ended[-1].error:
            raise AgreedError(self._told(step, ended[-1].error))
        return ended

    @property
    def seconds_to_save(self) -> float | None:
        """What a last save may take: the longest so far, twice while one is on its way; None before the first."""
        return self._seconds_to_save * (1 if self._pending is None else 2) or None

    def last_good(self) -> str:
        """A sentence for an error message."""
        complete = []
        with suppress(OSError):
            complete = complete_ones(self.folder)
        return f"Last good checkpoint: {complete[-1]}." if complete else "There is no earlier checkpoint."

    def _failed(self, save: _Save, began: float, error: str) -> Saved:
        if self._ranks.is_first:
            shutil.rmtree(save.hidden, ignore_errors=True)
        self._count_pause(save, began)
        self._failures += 1
        if self._failures == FAILURES_IN_A_ROW:
            raise AgreedError(self._told(save.step, error))
        return Saved(save.folder, save.step, time.perf_counter() - save.started, save.pause_seconds, error)

    def _told(self, step: int, error: str) -> str:
        return f"step {step}: the checkpoint could not be written: {error}. {self.last_good()}"

    def _publisher(self, save: _Save, parts: list[dict]) -> Callable[[], None]:
        """What is left to do for rank 0; nothing for the others."""
        if not self._ranks.is_first:
            return lambda: None
        files = {name: facts for part in parts for name, facts in part["files"].items()}
        state_keys = sorted({key for part in parts for key in part["state_keys"]})
        seconds = time.perf_counter() - save.started
        steps, identity = parts[0]["optimizer_steps"], self._identity.facts
        index = Index(save.step, steps, self._ranks.size, seconds, state_keys, identity, files)

        def publish() -> None:
            see_all(save.hidden, files)
            index.write(save.hidden)
            _swap(save.hidden, save.folder)
            with suppress(OSError):  # it is there; what is left is room
                sync(self.folder)
                for old in complete_ones(self.folder)[: -self._keep_last]:
                    _delete(old)

        return publish

    # Restoring

    def restore_latest(self, engine: Sharded) -> int:
        """Loads the newest whole checkpoint into the engine and returns its step; 0 when there is none. A collective.

        Damaged ones that are newer are put aside, and told in `warnings`. What killed runs left half done goes.

        Raises: AgreedError when there are only damaged ones, or some and `strict`, or another run's.
        """
        with self._ranks.fail_together():
            if self._ranks.is_first:
                for left in (*self.folder.glob(".writing_*"), *self.folder.glob(".deleting_*")):
                    shutil.rmtree(left, ignore_errors=True)
        index, folder, self.warnings = newest_whole(
            self.folder, self._identity, self._ranks, self._strict, self._heartbeat
        )
        if index is None:
            return 0
        self._heartbeat()
        engine.restore(index.optimizer_steps, index.state_keys)
        names, own = list(index.files), self._ranks.rank % len(index.files)
        with self._ranks.fail_together():
            # On as many ranks as before, the first file has all.
            fill(engine, folder, names[own:] + names[:own], self._heartbeat)
        engine.publish()
        self.last_step, self._seconds_to_save = index.step, index.seconds
        return index.step


def _blocks_in(folder: Path) -> int:
    try:
        return sum(entry.stat().st_blocks for entry in os.scandir(folder))
    except OSError:
        return 0


def _swap(hidden: Path, folder: Path) -> None:
    """Publishes. The same step's earlier checkpoint, if there is one, goes only when the new one has come."""
    if not folder.exists():
        hidden.rename(folder)
        return
    aside = folder.with_name(f".deleting_{folder.name}")
    folder.rename(aside)
    try:
        hidden.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _delete(folder: Path) -> None:
    """Out of sight first: a kill in the middle leaves no half checkpoint. A failure costs space, never the run."""
    hidden = folder.with_name(f".deleting_{folder.name}")
    try:
        folder.rename(hidden)
    except OSError:
        return
    shutil.rmtree(hidden, ignore_errors=True)
