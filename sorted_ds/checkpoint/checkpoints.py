"""The checkpoints of a run: written while training goes on, complete or invisible, and found again at the next start.

In: the engine's shards, optimizer state and buffers. Out: an engine that is restored to a step. On disk:

    RUN_DIR/checkpoints/step_00000200/
        rank_0000.safetensors ...   fp32 master weights and optimizer state, each rank's own (shard_files.py)
        buffers.safetensors         the model's buffers, if it has any (buffer_file.py)
        checkpoint.json             step, the run's identity, size and sha256 of each file (index.py)

A save has two phases. In the first one each rank copies its shards, training goes on, and a thread writes the copies
into a hidden folder. In the second one rank 0's thread adds checkpoint.json and renames the folder. So a run that is
killed leaves either the complete checkpoint or none. Ranks agree that a phase has ended within the sum that begins each
step (`is_ready`); their threads do not communicate. Rows, samples and learning rate follow from the step and are not
saved. Nothing is pickled.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from sorted_ds.base.errors import AgreedError
from sorted_ds.base.files import move_over, remove, remove_unfinished, sync
from sorted_ds.checkpoint.background import Staging, Task, wait_for_ranks
from sorted_ds.checkpoint.buffer_file import BUFFERS_FILE, copy_buffers, read_buffers
from sorted_ds.checkpoint.finding import find_newest_intact
from sorted_ds.checkpoint.folders import (
    checkpoint_name,
    delete,
    num_blocks,
    published_checkpoints,
    writing_folder,
)
from sorted_ds.checkpoint.identity import Identity
from sorted_ds.checkpoint.index import Index, wait_for, wait_for_files
from sorted_ds.checkpoint.shard_files import (
    Sharded,
    load_shards,
    rank_file,
    require_finite,
    state_keys_of,
    tensors_to_save,
    write_file,
)
from sorted_ds.cluster.ranks import Ranks

MAX_FAILURES_IN_A_ROW = 2
"""After this number of failed saves the run ends. One may fail because the disk is full for an hour."""


@dataclass(frozen=True)
class SaveResult:
    """How a save ended."""

    folder: Path
    step: int
    seconds: float
    """Time from the start of the save until the checkpoint was published."""
    pause_seconds: float
    """Time that training waited for the save."""
    error: str = ""
    """Why the save failed; empty if it succeeded."""


@dataclass
class _PendingSave:
    """A save that has not ended."""

    folder: Path
    hidden: Path
    step: int
    started: float
    task: Task = field(init=False)
    """This rank's work in the current phase."""
    pause_seconds: float = 0.0
    chunks_read: list[int] = field(default_factory=list)
    """Bytes of each chunk that was read to compute the checksums of this rank's files."""
    is_written: bool = False
    """Whether every rank has written its files, so that rank 0 publishes now."""


class Checkpoints:
    """Saves and restores the checkpoints of one run."""

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        identity: Identity,
        ranks: Ranks,
        asynchronous: bool = True,
        strict: bool = False,
        heartbeat: Callable[[], None] = lambda: None,
        keep_steps: Sequence[int] = (),
    ):
        """Keeps the newest `keep_last` checkpoints in `folder`, and calls `heartbeat` while work makes progress.

        `strict` makes a damaged checkpoint an error, even if an older one is intact. The checkpoints of `keep_steps`
        are never deleted.
        """
        self.folder = folder
        self.warnings: list[str] = []
        """Messages to the user about how the run was restored."""
        self.last_step = 0
        """Step of the newest intact checkpoint."""
        self.total_pause_seconds = 0.0
        """Time that training has waited for saves."""
        self._longest_save_seconds = 0.0
        self._keep_last, self._identity, self._ranks, self._strict = keep_last, identity, ranks, strict
        self._kept = frozenset(checkpoint_name(step) for step in keep_steps)
        self._staging = Staging() if asynchronous else None
        self._pending: _PendingSave | None = None
        self._heartbeat = heartbeat
        self._failures = 0

    # Saving

    def start_save(self, engine: Sharded, step: int) -> list[SaveResult]:
        """Starts a save after the earlier one has ended, and returns the result of that one. Every rank must call this.

        Raises: AgreedError when two saves in a row have failed.
        """
        earlier, began, ranks = self.finish(), time.perf_counter(), self._ranks
        folder = self.folder / checkpoint_name(step)
        hidden = writing_folder(folder, ranks.gather(str(os.getpid()))[0])
        save = _PendingSave(folder, hidden, step, began)
        try:
            with ranks.fail_together():
                if ranks.is_first:
                    hidden.mkdir(parents=True)
                tensors, buffers = self._copy_to_host(tensors_to_save(engine)), engine.buffers()
                buffers = copy_buffers(buffers) if ranks.is_first else {}
        except AgreedError as error:
            return [*earlier, self._failed(save, began, str(error))]
        optimizer_steps = engine.steps_taken

        def write() -> dict:
            require_finite(tensors)
            wait_for(hidden.is_dir)
            contents = {rank_file(ranks.rank): tensors, **({BUFFERS_FILE: buffers} if buffers else {})}
            on_chunk = save.chunks_read.append
            return {
                "optimizer_steps": optimizer_steps,
                "state_keys": state_keys_of(tensors),
                "files": {name: write_file(hidden / name, own, on_chunk) for name, own in contents.items()},
            }

        save.task, self._pending = Task(write), save
        self._count_pause(save, began)
        return earlier if self._staging else [*earlier, *self.finish()]

    def _copy_to_host(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns tensors that training does not change while they are written. A synchronous save needs no copy."""
        if self._staging is not None:
            return self._staging.copy(tensors)
        return {name: value.cpu().contiguous() for name, value in tensors.items()}

    def is_ready(self) -> bool:
        """Returns whether this rank has finished its work in the current phase of a save."""
        return self._pending is not None and self._pending.task.is_done()

    def advance(self) -> list[SaveResult]:
        """Ends the current phase of the save; waits for ranks that are not ready. Every rank must call this.

        Returns the save's result if this was the last phase, otherwise an empty list.

        Raises: AgreedError when two saves in a row have failed.
        """
        save, began, result = self._pending, time.perf_counter(), {}
        assert save is not None
        wait_for_ranks(self._ranks, save.task, lambda: self._progress(save), self._heartbeat)
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
        self._longest_save_seconds = max(self._longest_save_seconds, seconds)
        return [SaveResult(save.folder, save.step, seconds, save.pause_seconds)]

    def _progress(self, save: _PendingSave) -> int:
        """Returns a number that grows while any rank writes or reads files.

        It counts allocated blocks, because safetensors 0.8.0 gives a file its full size before it writes the contents.
        """
        return len(save.chunks_read) + (num_blocks(save.hidden) if self._ranks.is_first else 0)

    def _count_pause(self, save: _PendingSave, began: float) -> None:
        seconds = time.perf_counter() - began
        save.pause_seconds += seconds
        self.total_pause_seconds += seconds

    def finish(self) -> list[SaveResult]:
        """Waits until the pending save, if there is one, has ended; returns its result. Every rank must call this.

        Raises: AgreedError when two saves in a row have failed.
        """
        results = []
        while self._pending is not None:
            results += self.advance()
        return results

    @contextmanager
    def finish_on_error(self) -> Iterator[None]:
        """Publishes the pending save if the run ends by an error that all ranks raise."""
        try:
            yield
        except AgreedError:
            with suppress(AgreedError):
                self.finish()
            raise

    def save(self, engine: Sharded, step: int) -> list[SaveResult]:
        """Saves and waits until the checkpoint is published. Every rank must call this.

        Raises: AgreedError when it could not be written; the older checkpoints are unchanged.
        """
        results = [*self.start_save(engine, step), *self.finish()]
        if results[-1].error:
            raise AgreedError(self._failure_message(step, results[-1].error))
        return results

    @property
    def expected_save_seconds(self) -> float | None:
        """Returns how long a save that starts now may take, or None before the first save.

        That is as long as the longest save took, and twice as long if another one is pending.
        """
        return self._longest_save_seconds * (1 if self._pending is None else 2) or None

    def last_good(self) -> str:
        """Returns a sentence for error messages that names the newest checkpoint."""
        published = []
        with suppress(OSError):
            published = published_checkpoints(self.folder)
        return f"Last good checkpoint: {published[-1]}." if published else "There is no earlier checkpoint."

    def _failed(self, save: _PendingSave, began: float, error: str) -> SaveResult:
        if self._ranks.is_first:
            remove(save.hidden)
        self._count_pause(save, began)
        self._failures += 1
        if self._failures == MAX_FAILURES_IN_A_ROW:
            raise AgreedError(self._failure_message(save.step, error))
        return SaveResult(save.folder, save.step, time.perf_counter() - save.started, save.pause_seconds, error)

    def _failure_message(self, step: int, error: str) -> str:
        return f"step {step}: the checkpoint could not be written: {error}. {self.last_good()}"

    def _publisher(self, save: _PendingSave, parts: list[dict]) -> Callable[[], None]:
        """Returns this rank's work in the second phase: rank 0 publishes, the other ranks do nothing."""
        if not self._ranks.is_first:
            return lambda: None
        files = {name: facts for part in parts for name, facts in part["files"].items()}
        state_keys = sorted({key for part in parts for key in part["state_keys"]})
        seconds = time.perf_counter() - save.started
        steps, identity = parts[0]["optimizer_steps"], self._identity.facts
        index = Index(save.step, steps, self._ranks.size, seconds, state_keys, identity, files)

        def write_index_and_publish() -> None:
            wait_for_files(save.hidden, files)
            index.write(save.hidden)
            move_over(save.hidden, save.folder)
            with suppress(OSError):  # the checkpoint is published; what may fail now costs only space
                sync(self.folder)
                for old in published_checkpoints(self.folder)[: -self._keep_last]:
                    if old.name not in self._kept:
                        delete(old)

        return write_index_and_publish

    # Restoring

    def restore_latest(self, engine: Sharded) -> int:
        """Loads the newest intact checkpoint and returns its step, or 0 if there is none. Every rank must call this.

        Newer checkpoints that are damaged are renamed and listed in `warnings`. Unfinished folders of killed runs are
        deleted.

        Raises: AgreedError when every checkpoint is damaged, when one is and `strict` is set, or when they belong to
        another run.
        """
        with self._ranks.fail_together():
            if self._ranks.is_first:
                remove_unfinished(self.folder)
        index, folder, self.warnings = find_newest_intact(
            self.folder, self._identity, self._ranks, self._strict, self._heartbeat
        )
        if index is None:
            return 0
        self._heartbeat()
        engine.restore(index.optimizer_steps, index.state_keys)
        rank_files, buffers = [name for name in index.files if name != BUFFERS_FILE], {}
        own = self._ranks.rank % len(rank_files)
        with self._ranks.fail_together():
            buffers = read_buffers(folder, index.files, engine.buffers())
            # With an unchanged number of ranks, a rank finds all of its shards in its own file, which it reads first.
            load_shards(engine, folder, rank_files[own:] + rank_files[:own], self._heartbeat)
        engine.load_buffers(buffers)
        engine.publish()
        self.last_step, self._longest_save_seconds = index.step, index.seconds
        return index.step
