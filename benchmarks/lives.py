"""Lives of runs: each meets several faults until it is through, on this machine or as jobs of a cluster.

In: an uninterrupted run, a copy of it with nothing trained, kinds of faults. Out: the faults, and what came of each.
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
from sorted_ds.checkpoint.finding import complete_ones
from sorted_ds.checkpoint.index import name_of
from tests import launched
from tests.cluster.machines import Cluster
from tests.cluster.test_slurm import Job
from tests.launched import masters, metrics, run_dir
from tests.spawn import ROOT

STEPS, EVAL_STEPS = 400, 15
SECONDS_TO_END = 120
"""After which what is left of a run counts as a hang, or as orphans."""
SECONDS_OF_SLURM = 2 * SECONDS_TO_END
"""Slurm gives a lost node up after a while, and waits before it starts a job again."""
MOMENTS = ("start", "step", "step", "saving", "saving", "saving", "evaluation", "end")
SPARE_STARTS = 4


@dataclass
class Fault:
    """One, and what came of it."""

    kind: str
    moment: str
    what: str
    seconds_to_end: float = 0.0
    """Until every process of the run was gone; in Slurm, until the job was queued again or over."""
    seconds_to_resume: float = 0.0
    """From the next start to its first step; in Slurm from the fault, so with what it waits."""
    half_saved: bool = False
    """Whether a checkpoint was left unfinished."""
    left_over: bool = False
    """Whether processes were still there after `SECONDS_TO_END`, or trained on to the end; or Slurm held the job."""
    submitted_again: bool = False
    """In Slurm: whether a user had to, because the job had failed."""
    equal: bool = False
    steps_otherwise: int = 0
    """Reported twice, or with another loss or gradient norm than in the uninterrupted run."""
    steps_unreported: int = 0
    """A full disk costs the curves."""
    failed_starts: int = 0
    """Of its life: those that ended with an error, or without a model, and no fault had struck them."""

    @property
    def cost_nothing(self) -> bool:
        return self.equal and not (
            self.left_over or self.steps_otherwise or self.steps_unreported or self.failed_starts
        )


def settings(steps: int) -> list[str]:
    more = ["checkpoint.every_steps=10", f"eval.every_steps={EVAL_STEPS}", "train.hang_minutes=0.75"]
    return [*launched.SETTINGS, f"train.steps={steps}", *more]


class Start(ABC):
    """One start of a run, followed line by line."""

    def __init__(self, run: Path, steps: int):
        self.run, self.steps, self.began = run, steps, time.monotonic()

    @abstractmethod
    def said(self) -> str:
        """What it has printed so far."""

    @abstractmethod
    def has_ranks(self) -> bool:
        """Whether its ranks were started."""

    @abstractmethod
    def is_over(self) -> bool:
        """Whether it has ended."""

    @property
    def step(self) -> int:
        """The last one reported; 0 before the first."""
        steps = re.findall(r"^step (\d+)/.*\n", self.said(), re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def wait(self, is_so: Callable[[], bool], seconds: float = 100) -> bool:
        """False when the start ends first, or it takes too long."""
        end = time.monotonic() + seconds
        while not is_so():
            if self.is_over() or time.monotonic() > end:
                return False
            time.sleep(0.001)
        return True

    def is_saving(self) -> bool:
        """Now, or when it was killed: a start removes what earlier ones left."""
        return any((run_dir(self.run) / "checkpoints").glob(".writing_*"))

    def is_through(self) -> bool:
        return (run_dir(self.run) / "checkpoints" / name_of(self.steps)).exists()

    def reach(self, moment: str, chance: random.Random) -> bool:
        """Whether the moment came: a run can be over before it."""
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
    """`sorted-ds train`."""

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

    def said(self) -> str:
        return self.lines

    def has_ranks(self) -> bool:
        return len(injuries.ranks(self.run)) == 2

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def gone(self) -> tuple[float, bool]:
        """Seconds until all of its processes were gone, and whether some had to be killed."""
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
        """Waits for the end; whether the run is through."""
        return self.process.wait(timeout=300) == 0 and (run_dir(self.run) / "model").is_dir()


def live(
    original: Path,
    run: Path,
    kinds: Iterable[str],
    chance: random.Random,
    steps: int = STEPS,
    moments: Sequence[str] = MOMENTS,
) -> list[Fault]:
    """A life on this machine."""
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
            was_through, what = starts[-1].is_through(), KILLS[kind](run, chance)
        seconds, left_over = starts[-1].gone()
        if "kill" in kind:  # whoever is left must not train on to the end
            left_over |= starts[-1].is_through() and not was_through
        if is_damage:
            moment, checkpoints = "between starts", complete_ones(run_dir(run) / "checkpoints")
            what = DAMAGES[kind](checkpoints[-1], chance) if len(checkpoints) > 1 else ""
        faults.append(Fault(kind, moment, what, seconds, half_saved=starts[-1].is_saving(), left_over=left_over))
        starts.append(Command(run, steps))
    failed = 0
    while not starts[-1].ended_well() and (failed := failed + 1) < SPARE_STARTS:
        starts.append(Command(run, steps))
    for fault, start in zip(faults, starts[1:], strict=False):
        fault.seconds_to_resume = start.first_step - start.began if start.first_step else 0.0
    faults = [fault for fault in faults if fault.what]
    judge(original, run, faults, steps, failed)
    return faults


class StartOfJob(Start):
    """From where a job is submitted, or queued again, to where it is queued again or over."""

    def __init__(self, job: Job, steps: int):
        super().__init__(job.run, steps)
        self.job, self.said_before, self.restarts = job, len(job.log), job.state("Restarts")
        self.asked, self.over, self.struck = 0.0, False, 0.0

    def said(self) -> str:
        return self.job.log[self.said_before :]

    def has_ranks(self) -> bool:
        return self.job.state() == "RUNNING"

    def is_over(self) -> bool:
        """Slurm is asked twice a second."""
        if not self.over and time.monotonic() > self.asked + 0.5:
            self.over = self.job.has_ended() or self.job.state("Restarts") != self.restarts
            self.asked = time.monotonic()
        return self.over

    def is_held(self) -> bool:
        return "held" in self.job.state("Reason").lower()

    def ended(self) -> bool:
        """Waits for it; False where it takes too long."""
        self.wait(lambda: False, SECONDS_OF_SLURM)
        return self.over


def live_in_slurm(
    original: Path, run: Path, kinds: Iterable[str], chance: random.Random, cluster: Cluster
) -> list[Fault]:
    """A life as jobs of a cluster. One that Slurm does not start again by itself is submitted anew."""
    faults: list[Fault] = []
    start = _next_start(cluster, run)
    for kind in kinds:
        moment = chance.choice(MOMENTS)
        if moment != "start":
            start = _first_step(cluster, faults, start)
        if not start.reach(moment, chance):
            break
        began, half_saved = time.monotonic(), start.is_saving()
        if not (what := CLUSTER[kind](cluster, chance)):
            continue
        left_over = not start.ended()
        seconds, state = time.monotonic() - began, start.job.state()
        what = f"{what}; then the job was {state}"
        faults.append(Fault(kind, moment, what, seconds, half_saved=half_saved, left_over=left_over))
        if state == "COMPLETED":  # it did not notice
            start.struck = 0.0
            break
        faults[-1].submitted_again = start.job.has_ended()
        start = _next_start(cluster, run, start.job)
        start.struck = began
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
    """Waits for it, so that it is known what the last fault cost. Another start, where Slurm held the job before."""
    start.wait(lambda: start.step > 0 or start.is_held())
    if faults and start.is_held():
        faults[-1].left_over, faults[-1].what = True, f"{faults[-1].what} because of {start.job.state('Reason')}"
        struck = start.struck
        set_right(cluster, start.job)
        start = StartOfJob(start.job, STEPS)
        start.struck = struck
        start.wait(lambda: start.step > 0)
    if faults and start.struck and start.step:
        faults[-1].seconds_to_resume = time.monotonic() - start.struck
    return start


def _ended_well(start: StartOfJob) -> bool:
    """Waits for the end; whether the run is through."""
    return start.ended() and start.job.state() == "COMPLETED" and (run_dir(start.run) / "model").is_dir()


def set_right(cluster: Cluster, job: Job) -> None:
    """What an administrator does for nodes that Slurm drained, and for the job that it holds."""
    print(cluster.output("h1", "sinfo", "--long", "--Node"), flush=True)
    for host in cluster.hosts:
        cluster.on(host, "scontrol", "update", f"nodename={host}", "state=resume")
    cluster.on("h1", "scontrol", "release", job.number)


def judge(original: Path, run: Path, faults: list[Fault], steps: int, failed_starts: int) -> None:
    """Against the uninterrupted run."""
    before = masters(original, steps)
    after = masters(run, steps) if (run_dir(run) / "checkpoints" / name_of(steps)).is_dir() else {}
    equal = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    expected, found = ([row for row in metrics(r) if "loss/training" in row] for r in (original, run))
    keys = ("step", "loss/training", "optimizer/gradient_norm")
    trained = [tuple(row[key] for key in keys) for row in found]
    wanted = [tuple(row[key] for key in keys) for row in expected]
    for fault in faults:
        fault.equal, fault.failed_starts = equal, failed_starts
        fault.steps_otherwise = len(trained) - len(set(trained) & set(wanted))
        fault.steps_unreported = len(set(wanted) - set(trained))
