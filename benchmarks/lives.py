"""Runs a training that meets several faults until it is finished, on this machine or as jobs of a cluster.

In: an uninterrupted run, a copy of it with nothing trained, and kinds of faults. Out: each `Fault` and its cost.
"""

import random
import re
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import injuries
from benchmarks.injuries import CLUSTER, DAMAGES, KILLS, processes
from sorted_ds.base.files import UNFINISHED
from sorted_ds.checkpoint.folders import checkpoint_name, published_checkpoints
from tests import launched
from tests.cluster.machines import Cluster
from tests.cluster.test_slurm import Job
from tests.launched import masters, metrics, run_dir
from tests.spawn import ROOT

STEPS, EVAL_STEPS = 400, 15
SECONDS_TO_END = 120
"""Processes of a run that are left after this time count as a hang, or as orphans."""
SECONDS_OF_SLURM = 2 * SECONDS_TO_END
"""Slurm takes a while to give a lost node up, and waits before it starts a job again."""
MOMENTS = ("start", "step", "step", "saving", "saving", "saving", "evaluation", "end")
SPARE_STARTS = 4


@dataclass
class Fault:
    """One fault and what it cost."""

    kind: str
    moment: str
    detail: str
    """What exactly was done."""
    seconds_to_end: float = 0.0
    """The time until every process of the run had ended; in Slurm, until the job was queued again or over."""
    seconds_to_resume: float = 0.0
    """The time from the next start to its first step; in Slurm from the fault, so with the time in the queue."""
    half_saved: bool = False
    """Whether a checkpoint was left half written."""
    left_over: bool = False
    """Whether processes still ran after `SECONDS_TO_END`, or trained on to the end, or Slurm held the job."""
    submitted_again: bool = False
    """Whether a user had to submit the job again, because it had failed. In Slurm only."""
    is_bit_equal: bool = False
    """Whether the run ended with the weights of the uninterrupted run."""
    different_steps: int = 0
    """Steps that were reported twice, or with another loss or gradient norm than in the uninterrupted run."""
    unreported_steps: int = 0
    """Steps without a report, because a full disk loses some."""
    failed_starts: int = 0
    """Starts in the same life that ended with an error or without a model, although no fault had struck them."""

    @property
    def cost_nothing(self) -> bool:
        return self.is_bit_equal and not (
            self.left_over or self.different_steps or self.unreported_steps or self.failed_starts
        )


def settings(steps: int) -> list[str]:
    more = ["checkpoint.every_steps=10", f"eval.every_steps={EVAL_STEPS}", "train.hang_minutes=0.75"]
    return [*launched.SETTINGS, f"train.steps={steps}", *more]


class Start(ABC):
    """One start of a run, whose output is read while it runs."""

    def __init__(self, run: Path, steps: int):
        self.run, self.steps, self.began = run, steps, time.monotonic()

    @abstractmethod
    def output(self) -> str:
        """Returns what the start has printed so far."""

    @abstractmethod
    def has_ranks(self) -> bool:
        """Whether the ranks were started."""

    @abstractmethod
    def is_over(self) -> bool:
        """Whether the start has ended."""

    @property
    def step(self) -> int:
        """The last reported step; 0 before the first."""
        steps = re.findall(r"^step (\d+)/.*\n", self.output(), re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def wait(self, condition: Callable[[], bool], seconds: float = 100) -> bool:
        """Waits until the condition is true. Returns False when the start ends first, or after so many seconds."""
        end = time.monotonic() + seconds
        while not condition():
            if self.is_over() or time.monotonic() > end:
                return False
            time.sleep(0.001)
        return True

    def is_saving(self) -> bool:
        """Whether a save is on its way, or was when the start was killed. The next start removes the leftovers."""
        return any((run_dir(self.run) / "checkpoints").glob(f"{UNFINISHED}*"))

    def is_finished(self) -> bool:
        """Whether the checkpoint of the last step exists."""
        return (run_dir(self.run) / "checkpoints" / checkpoint_name(self.steps)).exists()

    def reach(self, moment: str, chance: random.Random) -> bool:
        """Waits for the moment. Returns whether it came, because a run can be over before."""
        if moment == "start":
            if not self.wait(self.has_ranks):
                return False
            time.sleep(chance.uniform(0, 6))
            return not self.is_over()
        if moment == "end":
            return self.wait(lambda: self.step == self.steps) and not time.sleep(chance.uniform(0, 1.0))
        if not self.wait(lambda: self.step > 0):
            return False
        target = self.step + chance.randrange(self.steps // 7)
        if not self.wait(lambda: self.step >= target):
            return False
        if moment == "saving":
            return self.wait(self.is_saving)
        if moment == "evaluation":
            return self.wait(lambda: self.step % EVAL_STEPS == 0)
        return True


class Command(Start):
    """A start by `sorted-ds train`."""

    def __init__(self, run: Path, steps: int):
        super().__init__(run, steps)
        self.first_step, self.lines = 0.0, ""
        command = launched.command(run, *settings(steps))
        self.process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, errors="replace"
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines += line
            if not self.first_step and self.step:
                self.first_step = time.monotonic()

    def output(self) -> str:
        return self.lines

    def has_ranks(self) -> bool:
        return len(injuries.ranks(self.run)) == 2

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def wait_until_gone(self) -> tuple[float, bool]:
        """Returns the seconds until all processes of the start had ended, and whether some had to be killed."""
        began = time.monotonic()
        while left := processes(self.run):
            if time.monotonic() - began > SECONDS_TO_END:
                for process in left:
                    process.kill()
                return SECONDS_TO_END, True
            time.sleep(0.1)
        self.process.wait()
        return time.monotonic() - began, False

    def ended_well(self) -> bool:
        """Waits for the end, and returns whether the run is finished."""
        return self.process.wait(timeout=300) == 0 and (run_dir(self.run) / "model").is_dir()


def live(
    original: Path,
    run: Path,
    kinds: Iterable[str],
    chance: random.Random,
    steps: int = STEPS,
    moments: Sequence[str] = MOMENTS,
) -> list[Fault]:
    """Runs the copy on this machine through these faults to its end. Returns the faults that happened, judged."""
    faults, starts = [], [Command(run, steps)]
    for kind in kinds:
        is_damage = kind in DAMAGES
        late = "SIGSTOP" in kind or "disk" in kind
        moment = "step" if is_damage else chance.choice(moments[1:] if late else moments)
        if not starts[-1].reach(moment, chance):
            break
        if is_damage:
            starts[-1].process.terminate()
        else:
            was_finished, detail = starts[-1].is_finished(), KILLS[kind](run, chance)
        seconds, left_over = starts[-1].wait_until_gone()
        if "kill" in kind:  # the ranks that are left must not train on to the end
            left_over |= starts[-1].is_finished() and not was_finished
        if is_damage:
            moment, checkpoints = "between starts", published_checkpoints(run_dir(run) / "checkpoints")
            detail = DAMAGES[kind](checkpoints[-1], chance) if len(checkpoints) > 1 else ""
        faults.append(Fault(kind, moment, detail, seconds, half_saved=starts[-1].is_saving(), left_over=left_over))
        starts.append(Command(run, steps))
    failed = 0
    while not starts[-1].ended_well() and (failed := failed + 1) < SPARE_STARTS:
        starts.append(Command(run, steps))
    for fault, start in zip(faults, starts[1:], strict=False):
        fault.seconds_to_resume = start.first_step - start.began if start.first_step else 0.0
    faults = [fault for fault in faults if fault.detail]
    judge(original, run, faults, steps, failed)
    return faults


class StartOfJob(Start):
    """The part of a job from its submission, or from a requeue, to the next requeue or the end of the job."""

    def __init__(self, job: Job, steps: int):
        super().__init__(job.run, steps)
        self.job, self.log_start, self.restarts = job, len(job.log), job.state("Restarts")
        self.last_query_time, self.has_ended, self.fault_time = 0.0, False, 0.0

    def output(self) -> str:
        return self.job.log[self.log_start :]

    def has_ranks(self) -> bool:
        return self.job.state() == "RUNNING"

    def is_over(self) -> bool:
        """Asks Slurm twice a second at most."""
        if not self.has_ended and time.monotonic() > self.last_query_time + 0.5:
            self.has_ended = self.job.has_ended() or self.job.state("Restarts") != self.restarts
            self.last_query_time = time.monotonic()
        return self.has_ended

    def is_held(self) -> bool:
        return "held" in self.job.state("Reason").lower()

    def wait_for_end(self) -> bool:
        """Returns whether the start ended within `SECONDS_OF_SLURM`."""
        self.wait(lambda: False, SECONDS_OF_SLURM)
        return self.has_ended


def live_in_slurm(
    original: Path, run: Path, kinds: Iterable[str], chance: random.Random, cluster: Cluster
) -> list[Fault]:
    """Runs the copy as jobs of a cluster through these faults to its end. Returns the faults that happened, judged.

    A job that Slurm does not requeue by itself is submitted again.
    """
    faults: list[Fault] = []
    start = _next_start(cluster, run)
    for kind in kinds:
        moment = chance.choice(MOMENTS)
        if moment != "start":
            start = _first_step(cluster, faults, start)
        if not start.reach(moment, chance):
            break
        began, half_saved = time.monotonic(), start.is_saving()
        if not (detail := CLUSTER[kind](cluster, chance)):
            continue
        left_over = not start.wait_for_end()
        seconds, state = time.monotonic() - began, start.job.state()
        detail = f"{detail}; then the job was {state}"
        faults.append(Fault(kind, moment, detail, seconds, half_saved=half_saved, left_over=left_over))
        if state == "COMPLETED":  # the job did not notice the fault
            start.fault_time = 0.0
            break
        faults[-1].submitted_again = start.job.has_ended()
        start = _next_start(cluster, run, start.job)
        start.fault_time = began
    start, failed = _first_step(cluster, faults, start), 0
    while not _ended_well(start) and (failed := failed + 1) < SPARE_STARTS:
        start = _next_start(cluster, run, start.job)
    judge(original, run, faults, STEPS, failed)
    return faults


def _next_start(cluster: Cluster, run: Path, job: Job | None = None) -> StartOfJob:
    if job is None or job.has_ended():
        job = Job(cluster, run, settings=settings(STEPS))
    return StartOfJob(job, STEPS)


def _first_step(cluster: Cluster, faults: list[Fault], start: StartOfJob) -> StartOfJob:
    """Waits for the first step, which tells how long the last fault delayed the run, and returns the start.

    If Slurm holds the job, the job is released, and the result is another start.
    """
    start.wait(lambda: start.step > 0 or start.is_held())
    if faults and start.is_held():
        faults[-1].left_over, faults[-1].detail = True, f"{faults[-1].detail} because of {start.job.state('Reason')}"
        fault_time = start.fault_time
        release(cluster, start.job)
        start = StartOfJob(start.job, STEPS)
        start.fault_time = fault_time
        start.wait(lambda: start.step > 0)
    if faults and start.fault_time and start.step:
        faults[-1].seconds_to_resume = time.monotonic() - start.fault_time
    return start


def _ended_well(start: StartOfJob) -> bool:
    """Waits for the end, and returns whether the run is finished."""
    return start.wait_for_end() and start.job.state() == "COMPLETED" and (run_dir(start.run) / "model").is_dir()


def release(cluster: Cluster, job: Job) -> None:
    """Resumes nodes that Slurm has drained and releases the job that it holds, as an administrator would."""
    print(cluster.output("h1", "sinfo", "--long", "--Node"), flush=True)
    for host in cluster.hosts:
        cluster.on(host, "scontrol", "update", f"nodename={host}", "state=resume")
    cluster.on("h1", "scontrol", "release", job.number)


def judge(original: Path, run: Path, faults: list[Fault], steps: int, failed_starts: int) -> None:
    """Compares the run with the uninterrupted one, and writes the result into each fault."""
    before = masters(original, steps)
    after = masters(run, steps) if (run_dir(run) / "checkpoints" / checkpoint_name(steps)).is_dir() else {}
    equal = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    expected, found = ([row for row in metrics(r) if "loss/training" in row] for r in (original, run))
    keys = ("step", "loss/training", "optimizer/gradient_norm")
    trained = [tuple(row[key] for key in keys) for row in found]
    uninterrupted = [tuple(row[key] for key in keys) for row in expected]
    for fault in faults:
        fault.is_bit_equal, fault.failed_starts = equal, failed_starts
        fault.different_steps = len(trained) - len(set(trained) & set(uninterrupted))
        fault.unreported_steps = len(set(uninterrupted) - set(trained))
