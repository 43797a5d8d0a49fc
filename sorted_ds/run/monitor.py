"""What a run says while it trains: `metrics.jsonl`, TensorBoard, and the terminal.

In: sums of the steps since the last report, and measured sub-networks. Out, on rank 0 alone: one JSON object a line in
RUN_DIR/metrics.jsonl, the same scalars for TensorBoard in RUN_DIR/tensorboard, a progress bar on a terminal or plain
lines elsewhere. Sums travel, means are printed. TensorBoard sorts by name: the full network's validation loss is first.
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

from sorted_ds.checkpoint import SaveResult
from sorted_ds.cluster.ranks import Ranks
from sorted_ds.deploy.model_dir import Measured
from sorted_ds.deploy.table import console, measured_table
from sorted_ds.run.config import Run
from sorted_ds.run.plan import Plan
from sorted_ds.run.plan_text import plan_table, step_lines
from sorted_ds.space import SubNet, SubNetSpace
from sorted_ds.tasks import task_of

GIB = 2**30
METRICS, FULL_LOSS = "metrics.jsonl", "loss/full_validation"
SAVE_SECONDS, PAUSE_SECONDS = "speed/checkpoint_seconds", "speed/checkpoint_pause_seconds"


@dataclass(frozen=True)
class Trained:
    """The training losses of one sub-network since the last report, over all ranks."""

    nll: float
    """Nats, summed over targets."""
    num_targets: float
    num_visits: float


class LossSums:
    """Training losses since the last report, by sub-network, kept where the losses are made."""

    def __init__(self, subnets: Iterable[SubNet], visit_share: float, device: torch.device):
        """`visit_share`: the part of a sample that one forward pass of one rank is."""
        self._row = {subnet: row for row, subnet in enumerate(subnets)}
        self._sums = torch.zeros(len(self._row), 3, dtype=torch.float64, device=device)
        self._visit_share = visit_share

    def add(self, losses: Sequence[tuple[SubNet, Tensor, int]]) -> None:
        """A step's micro-batches on this rank: sub-network, summed loss, number of targets."""
        for subnet, nll, num_targets in losses:
            row = self._sums[self._row[subnet]]
            row[0] += nll
            row[1] += num_targets
            row[2] += self._visit_share

    def take(self, ranks: Ranks) -> dict[SubNet, Trained]:
        """The sums over all ranks of the sub-networks that were active, and a new start. A collective."""
        sums = torch.tensor(ranks.sum(self._sums.flatten().tolist()), dtype=torch.float64).view(-1, 3).tolist()
        self._sums.zero_()
        return {subnet: Trained(*sums[row]) for subnet, row in self._row.items() if sums[row][1]}


class Monitor:
    """Writes on rank 0; on other ranks every method does nothing."""

    def __init__(self, run: Run, space: SubNetSpace, first_step: int, ranks: Ranks):
        self._is_on = ranks.is_first
        self._num_steps, self._full, self._metrics = run.train.steps, space.full, task_of(run.task).metrics
        self.reported_step, self._paused = first_step, 0.0
        if not self._is_on:
            return
        self._console = Console(file=cast(IO[str], _Patient(sys.stderr)), highlight=False, soft_wrap=True)
        self._run_dir = run.run_dir
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._file = _opened_until(self._run_dir / METRICS, first_step)
        board = str(self._run_dir / "tensorboard")
        self._board = SummaryWriter(board, purge_step=first_step + 1) if run.log.tensorboard else None
        self._progress = _progress(self._console) if self._console.is_terminal else None

    def started(self, step: int, plan: Plan, changes: Sequence[str], warnings: Sequence[str] = ()) -> None:
        """Training begins: time counts from now. `changes`: what the run says otherwise than at the last start."""
        self._last = time.perf_counter()
        if not self._is_on:
            return
        told = [f"changed since the last start: {change}" for change in changes]
        told += [f"warning: {warning}" for warning in (*plan.warnings, *warnings)]
        for line in (plan_table(plan), *step_lines(plan), *told, f"writing to {self._run_dir}"):
            self._console.print(line)
        if step:
            self._console.print(f"going on from the checkpoint of step {step}")
        if self._progress:
            self._task = self._progress.add_task("", total=self._num_steps, completed=step, note="")
            self._progress.start()

    def trained(
        self, step: int, sums: dict[SubNet, Trained], learning_rate: float, gradient_norm: float, paused_seconds: float
    ) -> None:
        """The steps since the last report: all samples together, then each sub-network.

        `paused_seconds`: how long training has waited for checkpoints so far, which does not count as training.
        """
        seconds, steps = time.perf_counter() - self._last - (paused_seconds - self._paused), step - self.reported_step
        self._last, self.reported_step, self._paused = time.perf_counter(), step, paused_seconds
        if not self._is_on:
            return
        num_targets = sum(row.num_targets for row in sums.values())
        values = {
            "loss/training": sum(row.nll for row in sums.values()) / num_targets,
            "optimizer/learning_rate": learning_rate,
            "optimizer/gradient_norm": gradient_norm,
            "speed/tokens_per_second": num_targets / seconds,
            "speed/step_seconds": seconds / steps,
            "speed/memory_gib": memory_gib(),
        }
        for subnet, row in sums.items():
            values[f"subnets_training_loss/{subnet}"] = row.nll / row.num_targets
            values[f"subnets_visits/{subnet}"] = row.num_visits
        self._write(step, values)
        self._show(step, values)

    def evaluated(self, step: int, measured: Sequence[Measured], seconds: float) -> None:
        """Validation losses, the full network's first. The seconds do not count as training."""
        self._last += seconds
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
        """Whether an earlier start did, and said so in the curves. Known on rank 0."""
        if not self._is_on:
            return True
        rows = map(json.loads, (self._run_dir / METRICS).read_text().splitlines())
        return any(row["step"] == step and FULL_LOSS in row for row in rows)

    def saved(self, saves: Iterable[SaveResult]) -> None:
        """What became of checkpoints."""
        for save in saves:
            if self._is_on and save.error:
                self._console.print(f"warning: {save.folder.name} could not be written: {save.error}; going on without")
            elif self._is_on:
                self._write(save.step, {SAVE_SECONDS: save.seconds, PAUSE_SECONDS: save.pause_seconds})
                waited = f"training waited for {save.pause_seconds:.1f} s"
                self._console.print(f"saved {save.folder.name} in {save.seconds:.1f} s; {waited}")

    def ended(self, step: int, left_early: str) -> None:
        """The last word. `left_early`: why, and what comes of it."""
        if not self._is_on:
            return
        if step < self._num_steps:
            self._console.print(f"stopped after step {step} of {self._num_steps}: {left_early}")
        elif left_early:
            self._console.print(
                f"trained {step} steps; {self._run_dir} has the model, but no whole table: {left_early}"
            )
        else:
            self._console.print(f"trained {step} steps; model, table and figure are in {self._run_dir}")

    def table(self, measured: Sequence[Measured], baseline: Mapping[str, float] | None) -> None:
        """Every sub-network, on standard output."""
        if self._is_on:
            with suppress(OSError):  # nobody may be there to read it
                console().print(measured_table(measured, self._metrics, baseline))

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *error: object) -> None:
        """Leaves a usable terminal and whole files, whatever happened."""
        if not self._is_on:
            return
        if self._progress:
            self._progress.stop()
        for writer in (self._file, self._board):
            with suppress(OSError):
                if writer:
                    writer.close()

    def _write(self, step: int, values: dict[str, float]) -> None:
        """A full disk costs the curves, never the run."""
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            self._console.print(f"warning: the curves of step {step} could not be written: {error}")
        try:
            if self._board:
                for key, value in values.items():
                    self._board.add_scalar(key, value, step)
        except OSError as error:  # of its writing thread, which is dead now
            self._console.print(
                f"warning: TensorBoard's curves end at step {step}: {error}; metrics.jsonl has the rest"
            )
            self._board = None

    def _show(self, step: int, values: dict[str, float]) -> None:
        note = f"loss {values['loss/training']:.4f}  {values['speed/tokens_per_second']:,.0f} tokens/s"
        if self._progress:
            self._progress.update(self._task, completed=step, note=note)
            return
        left = _minutes((self._num_steps - step) * values["speed/step_seconds"])
        rate, norm = values["optimizer/learning_rate"], values["optimizer/gradient_norm"]
        self._console.print(f"step {step}/{self._num_steps}  {note}  rate {rate:.2e}  norm {norm:.2f}  {left} left")


class _Patient:
    """A stream whose reader may be gone: a launcher that was terminated must not cost the checkpoint."""

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


def _opened_until(path: Path, first_step: int) -> IO[str]:
    """The metrics file, without what a killed run wrote after the checkpoint that it resumes from."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if _step_of(line) <= first_step]
        hidden = path.with_name(f".writing_{path.name}")
        hidden.write_text("".join(f"{line}\n" for line in lines))
        hidden.replace(path)
    return path.open("a")


def _step_of(line: str) -> float:
    """Infinite for a line that a killed run did not finish."""
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
    """Peak of this process: GPU memory where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
