"""Reports what a run does while it trains: in metrics.jsonl, in TensorBoard and on the terminal.

In: sums of the steps since the last report, and measured sub-networks. On disk, by rank 0 alone: one JSON object a line
in RUN_DIR/metrics.jsonl, and the same numbers as curves in RUN_DIR/tensorboard. Out: a progress bar on a terminal, or
plain lines elsewhere. Ranks exchange sums; means are computed where they are printed.
"""

import itertools
import json
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from sorted_ds.base.files import replaced
from sorted_ds.checkpoint import SaveResult
from sorted_ds.cluster.ranks import Ranks
from sorted_ds.deploy.model_dir import Measured
from sorted_ds.deploy.speed import GIB
from sorted_ds.deploy.table import console, measured_table
from sorted_ds.run.config import Run
from sorted_ds.run.plan import Plan
from sorted_ds.run.plan_text import plan_table, step_lines
from sorted_ds.space import Pass, SubNet, SubNetSpace
from sorted_ds.tasks import task_of
from sorted_ds.tasks.losses import Parts

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
TRAINING_LOSS = "loss/training"
DIVERGENCE = "loss/divergence"
"""From the teacher, over all targets of the training loss."""
FULL_LOSS = "loss/full_validation"
"""TensorBoard sorts curves by name, so the full network's validation loss comes first."""
LEARNING_RATE, GRADIENT_NORM = "optimizer/learning_rate", "optimizer/gradient_norm"
TOKENS_PER_SECOND, STEP_SECONDS = "speed/tokens_per_second", "speed/step_seconds"
SAVE_SECONDS, PAUSE_SECONDS = "speed/checkpoint_seconds", "speed/checkpoint_pause_seconds"


@dataclass(frozen=True)
class Trained:
    """How one sub-network was trained since the last report, summed over all ranks."""

    nll: float
    """The training loss in nats, summed over targets."""
    num_targets: float
    num_visits: float
    """How often steps sampled the sub-network."""
    exit_nll: float = 0.0
    """The training loss in passes of deeper sub-networks, which end at this one too."""
    exit_targets: float = 0.0
    divergence: float = 0.0
    """The divergence from the teacher in nats, summed over the targets of sampled passes."""


TRAINED_COLUMNS = {field.name: column for column, field in enumerate(fields(Trained))}


@dataclass(frozen=True)
class PassLoss:
    """The loss of one pass that trained, on one rank."""

    pass_: Pass
    nll: Tensor
    """In nats, summed over targets."""
    num_targets: int
    parts: Parts | None = None
    """The parts of a weighted loss."""


class LossSums:
    """Sums the training losses of each sub-network since the last report, on the device that computes them."""

    def __init__(self, subnets: Iterable[SubNet], device: torch.device):
        self._row = {subnet: row for row, subnet in enumerate(subnets)}
        self._sums = torch.zeros(len(self._row), len(fields(Trained)), dtype=torch.float64, device=device)

    def add(self, losses: Sequence[PassLoss], visit_share: float) -> None:
        """Adds the passes of a step on this rank.

        `visit_share`: what one forward pass on one rank adds to the visits of a sub-network. All forward passes of all
        ranks on one share of a step's rows add up to one visit.
        """
        for each in losses:
            self._add(each.pass_.subnet, nll=each.nll, num_targets=each.num_targets, num_visits=visit_share)
            if each.parts is not None:
                self._add(each.pass_.subnet, divergence=each.parts.divergence[-1])
                for depth, nll in zip(each.pass_.exits, each.parts.nll, strict=False):
                    self._add(each.pass_.subnet.replace(d=depth), exit_nll=nll, exit_targets=each.num_targets)

    def _add(self, subnet: SubNet, **values: Tensor | float) -> None:
        row = self._sums[self._row[subnet]]
        for name, value in values.items():
            row[TRAINED_COLUMNS[name]] += value

    def take(self, ranks: Ranks) -> dict[SubNet, Trained]:
        """Returns the sums over all ranks for each sub-network that was trained, and sets them to 0.

        Every rank must call this.
        """
        sums = torch.tensor(ranks.sum(self._sums.flatten().tolist()), dtype=torch.float64).view(self._sums.shape)
        self._sums.zero_()
        return {subnet: Trained(*sums[row].tolist()) for subnet, row in self._row.items() if sums[row].any()}


class Monitor:
    """Reports the progress of a run. Rank 0 writes; on other ranks the methods write nothing."""

    def __init__(self, run: Run, space: SubNetSpace, first_step: int, ranks: Ranks):
        self._is_on = ranks.is_first
        self._num_steps, self._full, self._metrics = run.train.steps, space.full, task_of(run.task).metrics
        self._skipped = sorted(set(run.train.skip_steps))
        self.reported_step = first_step
        """The last step whose training losses were reported."""
        self._paused_seconds = 0.0
        if not self._is_on:
            return
        self._console = Console(file=cast(IO[str], _StreamThatMayClose(sys.stderr)), highlight=False, soft_wrap=True)
        self._run_dir = run.run_dir
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._file = self._open_metrics(first_step)
        self._board = self._open_board(first_step) if run.log.tensorboard else None
        self._progress = _progress(self._console) if self._console.is_terminal else None

    def _open_metrics(self, first_step: int) -> IO[str] | None:
        """Opens metrics.jsonl. A file that cannot be read is set aside, and curves never end the run."""
        path = self._run_dir / METRICS
        try:
            file, damaged = _open_without_later_steps(path, first_step)
        except OSError as error:
            self._console.print(f"warning: {path} cannot be written ({error.strerror}), so the run has no {METRICS}")
            return None
        if damaged:
            self._console.print(f"warning: {METRICS} was not as a run leaves it. It was renamed to {damaged}.")
        return file

    def _open_board(self, first_step: int) -> SummaryWriter | None:
        path = self._run_dir / TENSORBOARD
        try:
            if path.exists() and not path.is_dir():
                self._console.print(f"warning: {path} is not a folder. It was renamed to {_set_aside(path)}.")
            return SummaryWriter(str(path), purge_step=first_step + 1)
        except OSError as error:
            self._console.print(f"warning: {path} cannot be written ({error.strerror}), so TensorBoard shows nothing")
            return None

    def report_start(self, step: int, plan: Plan | None, changes: Sequence[str], warnings: Sequence[str] = ()) -> None:
        """Prints the plan, and what has changed in the run file since the last start. Training time counts from now.

        Only rank 0 needs the plan.
        """
        self._last_report = time.perf_counter()
        if not self._is_on:
            return
        assert plan is not None
        lines = [f"changed since the last start: {change}" for change in changes]
        lines += [f"steps that are not trained: {', '.join(map(str, self._skipped))}"] if self._skipped else []
        lines += [f"warning: {warning}" for warning in (*plan.warnings, *warnings)]
        for line in (plan_table(plan), *step_lines(plan), *lines, f"writing to {self._run_dir}"):
            self._console.print(line)
        if step:
            self._console.print(f"resuming from the checkpoint of step {step}")
        if self._progress:
            self._task = self._progress.add_task("", total=self._num_steps, completed=step, note="")
            self._progress.start()

    def report_training(
        self, step: int, sums: dict[SubNet, Trained], learning_rate: float, gradient_norm: float, paused_seconds: float
    ) -> None:
        """Reports the steps since the last report: all sub-networks together, then each one.

        `paused_seconds`: how long training has waited for checkpoints so far, which does not count as training.
        """
        paused_since_report = paused_seconds - self._paused_seconds
        seconds, steps = time.perf_counter() - self._last_report - paused_since_report, step - self.reported_step
        self._last_report, self.reported_step, self._paused_seconds = time.perf_counter(), step, paused_seconds
        if not self._is_on:
            return
        if not sums:
            self._console.print(f"step {step}/{self._num_steps}  skipped: train.skip_steps")
            return
        num_targets = sum(row.num_targets for row in sums.values())
        values = {
            TRAINING_LOSS: sum(row.nll for row in sums.values()) / num_targets,
            LEARNING_RATE: learning_rate,
            GRADIENT_NORM: gradient_norm,
            TOKENS_PER_SECOND: num_targets / seconds,
            STEP_SECONDS: seconds / steps,
            "speed/memory_gib": memory_gib(),
        }
        if divergence := sum(row.divergence for row in sums.values()):
            values[DIVERGENCE] = divergence / num_targets
        for subnet, row in sums.items():
            if row.num_targets:
                values[f"subnets_training_loss/{subnet}"] = row.nll / row.num_targets
                values[f"subnets_visits/{subnet}"] = row.num_visits
            if row.exit_targets:
                values[f"subnets_exit_loss/{subnet}"] = row.exit_nll / row.exit_targets
        self._write(step, values)
        self._show(step, values)

    def report_evaluation(self, step: int, measured: Sequence[Measured], seconds: float) -> None:
        """Reports validation losses, the full network's first. The seconds do not count as training."""
        self._last_report += seconds
        if not self._is_on:
            return
        losses = {row.subnet: row.loss for row in measured}
        full = losses.pop(self._full.name)
        values = {FULL_LOSS: full, "speed/validation_seconds": seconds}
        values |= {f"subnets_validation_loss/{name}": loss for name, loss in {self._full.name: full, **losses}.items()}
        self._write(step, values)
        spread = f"; {len(losses)} others {min(losses.values()):.4f} to {max(losses.values()):.4f}" if losses else ""
        self._console.print(f"step {step}: validation loss {full:.4f} (full){spread}; took {seconds:.1f} s")

    def has_evaluated(self, step: int) -> bool:
        """Returns whether metrics.jsonl has an evaluation of this step. Only rank 0 knows; other ranks return True."""
        if not self._is_on:
            return True
        return any(row["step"] == step and FULL_LOSS in row for row in _read(self._run_dir / METRICS)[0])

    def report_saves(self, saves: Iterable[SaveResult]) -> None:
        """Reports how saves of checkpoints ended."""
        for save in saves:
            if self._is_on and save.error:
                self._console.print(
                    f"warning: {save.folder.name} could not be written: {save.error}. Training continues without it."
                )
            elif self._is_on:
                self._write(save.step, {SAVE_SECONDS: save.seconds, PAUSE_SECONDS: save.pause_seconds})
                waited = f"training waited for {save.pause_seconds:.1f} s"
                self._console.print(f"saved {save.folder.name} in {save.seconds:.1f} s; {waited}")

    def report_end(self, step: int, early_end: str) -> None:
        """Reports how the run ended. `early_end`: why it stopped early and what happens next, or an empty string."""
        if not self._is_on:
            return
        if step < self._num_steps:
            self._console.print(f"stopped after step {step} of {self._num_steps}: {early_end}")
        elif early_end:
            self._console.print(
                f"trained {step} steps; the model is in {self._run_dir}, but its table is not complete: {early_end}"
            )
        else:
            self._console.print(f"trained {step} steps; model, table and figure are in {self._run_dir}")

    def print_table(self, measured: Sequence[Measured], baseline: Mapping[str, float] | None) -> None:
        """Prints the measured table on standard output."""
        if self._is_on:
            with suppress(OSError):  # the reader may have closed it
                console().print(measured_table(measured, self._metrics, baseline))

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *error: object) -> None:
        """Restores the terminal and closes the files, also after an error."""
        if not self._is_on:
            return
        if self._progress:
            self._progress.stop()
        for writer in (self._file, self._board):
            with suppress(OSError):
                if writer:
                    writer.close()

    def _write(self, step: int, values: dict[str, float]) -> None:
        """Adds numbers to the curves. A disk that is full ends the curves and not the run."""
        try:
            if self._file:
                self._file.write(json.dumps({"step": step, **values}) + "\n")
                self._file.flush()
        except OSError as error:
            self._console.print(f"warning: the curves of step {step} could not be written: {error}")
        try:
            if self._board:
                for key, value in values.items():
                    self._board.add_scalar(key, value, step)
        except OSError as error:
            self._console.print(f"warning: TensorBoard's curves end at step {step}: {error}; {METRICS} has the rest")
            self._board = None  # the error has ended TensorBoard's writing thread

    def _show(self, step: int, values: dict[str, float]) -> None:
        note = f"loss {values[TRAINING_LOSS]:.4f}  {values[TOKENS_PER_SECOND]:,.0f} tokens/s"
        if self._progress:
            self._progress.update(self._task, completed=step, note=note)
            return
        left = _minutes((self._num_steps - step) * values[STEP_SECONDS])
        rate, norm = values[LEARNING_RATE], values[GRADIENT_NORM]
        self._console.print(f"step {step}/{self._num_steps}  {note}  lr {rate:.2e}  norm {norm:.2f}  {left} left")


class _StreamThatMayClose:
    """A stream that ignores errors, because a launcher that has ended reads no more and the last save must go on."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            return

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def _open_without_later_steps(path: Path, first_step: int) -> tuple[IO[str], Path | None]:
    """Opens metrics.jsonl. Removes what a killed run wrote after the checkpoint that this start resumes from.

    If the file cannot be read, or has lines that no run writes, it is kept under another name, which is the second
    value. Raises: OSError.
    """
    kept = None
    if path.exists():
        rows, is_damaged = _read(path)
        if is_damaged:
            kept = _set_aside(path)
        with replaced(path) as hidden:
            hidden.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= first_step))
    return path.open("a"), kept


def _set_aside(path: Path) -> Path:
    """Renames a file or folder to the first free name like `metrics.jsonl.damaged1`. Raises: OSError."""
    names = (path.with_name(f"{path.name}.damaged{number}") for number in itertools.count(1))
    kept = next(name for name in names if not name.exists())
    path.rename(kept)
    return kept


def _read(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Returns the rows of metrics.jsonl, and whether it has other lines.

    A last line that is not complete does not count: a killed run leaves one.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:  # a folder, or a file of someone else
        return [], True
    rows = [_row_of(line) for line in lines]
    is_damaged = any(row is None and line.strip() for row, line in zip(rows[:-1], lines[:-1], strict=True))
    return [row for row in rows if row is not None], is_damaged


def _row_of(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if is_row else None


def _progress(console: Console) -> Progress:
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, TimeRemainingColumn(), console=console)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def memory_gib() -> float:
    """Returns the peak memory of this process: on the GPU if it has one, otherwise the resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
