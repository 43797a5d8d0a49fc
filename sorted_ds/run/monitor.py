"""Reports what a run does while it trains: in metrics.jsonl, in TensorBoard and on the terminal.

In: sums of the steps since the last report, and measured sub-networks. On disk, by rank 0 alone: one JSON object a line
in RUN_DIR/metrics.jsonl, and the same numbers as curves in RUN_DIR/tensorboard. Out: a progress bar on a terminal, or
plain lines elsewhere. Ranks exchange sums; means are computed where they are printed.
"""

import json
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from sorted_ds.base.files import replaced
from sorted_ds.checkpoint import SaveResult
from sorted_ds.cluster.ranks import Ranks
from sorted_ds.deploy.model_dir import Measured
from sorted_ds.deploy.table import GIB, console, measured_table
from sorted_ds.run.config import Run
from sorted_ds.run.plan import Plan
from sorted_ds.run.plan_text import plan_table, step_lines
from sorted_ds.space import SubNet, SubNetSpace
from sorted_ds.tasks import task_of

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
TRAINING_LOSS = "loss/training"
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
    """How often steps trained the sub-network."""


class LossSums:
    """Sums the training losses of each sub-network since the last report, on the device that computes them."""

    def __init__(self, subnets: Iterable[SubNet], visit_share: float, device: torch.device):
        """`visit_share`: what one forward pass on one rank adds to the visits of a sub-network.

        All forward passes of all ranks on one share of a step's rows add up to one visit.
        """
        self._row = {subnet: row for row, subnet in enumerate(subnets)}
        self._sums = torch.zeros(len(self._row), 3, dtype=torch.float64, device=device)
        self._visit_share = visit_share

    def add(self, losses: Sequence[tuple[SubNet, Tensor, int]]) -> None:
        """Adds the passes of a step on this rank: sub-network, summed loss, number of targets."""
        for subnet, nll, num_targets in losses:
            row = self._sums[self._row[subnet]]
            row[0] += nll
            row[1] += num_targets
            row[2] += self._visit_share

    def take(self, ranks: Ranks) -> dict[SubNet, Trained]:
        """Returns the sums over all ranks for each sub-network that was trained, and sets them to 0.

        Every rank must call this.
        """
        sums = torch.tensor(ranks.sum(self._sums.flatten().tolist()), dtype=torch.float64).view(-1, 3).tolist()
        self._sums.zero_()
        return {subnet: Trained(*sums[row]) for subnet, row in self._row.items() if sums[row][1]}


class Monitor:
    """Reports the progress of a run. Rank 0 writes; on other ranks the methods write nothing."""

    def __init__(self, run: Run, space: SubNetSpace, first_step: int, ranks: Ranks):
        self._is_on = ranks.is_first
        self._num_steps, self._full, self._metrics = run.train.steps, space.full, task_of(run.task).metrics
        self.reported_step = first_step
        """The last step whose training losses were reported."""
        self._paused_seconds = 0.0
        if not self._is_on:
            return
        self._console = Console(file=cast(IO[str], _StreamThatMayClose(sys.stderr)), highlight=False, soft_wrap=True)
        self._run_dir = run.run_dir
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._file = _open_without_later_steps(self._run_dir / METRICS, first_step)
        board = str(self._run_dir / TENSORBOARD)
        self._board = SummaryWriter(board, purge_step=first_step + 1) if run.log.tensorboard else None
        self._progress = _progress(self._console) if self._console.is_terminal else None

    def report_start(self, step: int, plan: Plan, changes: Sequence[str], warnings: Sequence[str] = ()) -> None:
        """Prints the plan, and what has changed in the run file since the last start. Training time counts from now."""
        self._last_report = time.perf_counter()
        if not self._is_on:
            return
        lines = [f"changed since the last start: {change}" for change in changes]
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
        num_targets = sum(row.num_targets for row in sums.values())
        values = {
            TRAINING_LOSS: sum(row.nll for row in sums.values()) / num_targets,
            LEARNING_RATE: learning_rate,
            GRADIENT_NORM: gradient_norm,
            TOKENS_PER_SECOND: num_targets / seconds,
            STEP_SECONDS: seconds / steps,
            "speed/memory_gib": memory_gib(),
        }
        for subnet, row in sums.items():
            values[f"subnets_training_loss/{subnet}"] = row.nll / row.num_targets
            values[f"subnets_visits/{subnet}"] = row.num_visits
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
        rows = map(json.loads, (self._run_dir / METRICS).read_text().splitlines())
        return any(row["step"] == step and FULL_LOSS in row for row in rows)

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
        self._console.print(f"step {step}/{self._num_steps}  {note}  rate {rate:.2e}  norm {norm:.2f}  {left} left")


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


def _open_without_later_steps(path: Path, first_step: int) -> IO[str]:
    """Opens metrics.jsonl. Removes what a killed run wrote after the checkpoint that this start resumes from."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if _step_of(line) <= first_step]
        with replaced(path) as hidden:
            hidden.write_text("".join(f"{line}\n" for line in lines))
    return path.open("a")


def _step_of(line: str) -> float:
    """Returns the step of a line of metrics.jsonl; infinity for a line that a killed run did not finish."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")


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
