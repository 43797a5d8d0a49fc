"""Injures real runs at random moments, starts them again, and counts what that cost. About 40 s a fault.

`python -m benchmarks.faults --minutes 60` goes on where it stopped; what is known is kept in .cache/faults.jsonl,
thrown away when the code or a version changes, and summed up in docs/faults.md. A *life* is one run that meets several
faults until it is through; then its weights must be those of an uninterrupted run, bit for bit, and each step must be
reported once, with the same loss and gradient norm. The lives in Slurm need root and tests/cluster/install.sh;
`--no-cluster` leaves them out.
"""

import argparse
import random
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import injuries
from benchmarks.common import circumstances
from benchmarks.injuries import CLUSTER, DAMAGES, KILLS, fresh, processes
from benchmarks.kept import keep, kept_rows
from sorted_ds.checkpoint.finding import complete_ones
from sorted_ds.checkpoint.index import name_of
from sorted_ds.run_dir import code_digest, versions
from tests import launched
from tests.cluster.machines import Cluster, forbidden, missing
from tests.cluster.test_slurm import Job
from tests.launched import masters, metrics, run_dir
from tests.runs import run_file
from tests.spawn import ROOT

STEPS, EVAL_STEPS = 400, 15
FAULTS_OF_A_LIFE, EVERY = 4, 5
SECONDS_TO_END = 120
"""After which what is left of a run counts as a hang, or as orphans."""
MOMENTS = ("start", "step", "step", "saving", "saving", "saving", "evaluation", "end")
KNOWN = ROOT / ".cache" / "faults.jsonl"
SUMMARY = ROOT / "docs" / "faults.md"


@dataclass
class Fault:
    """One, and what came of it."""

    kind: str
    moment: str
    what: str
    seconds_to_end: float = 0.0
    """Until every process of the run was gone."""
    seconds_to_resume: float = 0.0
    """From the next start to its first step."""
    half_saved: bool = False
    """Whether a checkpoint was left unfinished."""
    left_over: bool = False
    """Whether processes were still there after `SECONDS_TO_END`, or trained on to the end."""
    equal: bool = False
    steps_otherwise: int = 0
    """Reported twice, or with another loss or gradient norm than in the uninterrupted run."""
    steps_unreported: int = 0
    """A full disk costs the curves."""


def settings(steps: int) -> list[str]:
    more = ["checkpoint.every_steps=10", f"eval.every_steps={EVAL_STEPS}", "train.hang_minutes=0.75"]
    return [*launched.SETTINGS, f"train.steps={steps}", *more]


class Start:
    """`sorted-ds train` once, followed line by line."""

    def __init__(self, run: Path, steps: int):
        self.run, self.steps, self.began, self.first_step = run, steps, time.monotonic(), 0.0
        self.lines: list[str] = []
        command = launched.command(run, *settings(steps))
        self.process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, errors="replace"
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("step ") and "/" in line and not self.first_step:
                self.first_step = time.monotonic()

    @property
    def step(self) -> int:
        steps = [line for line in self.lines if line.startswith("step ") and "/" in line.split()[1]]
        return int(steps[-1].split()[1].partition("/")[0]) if steps else 0

    def wait(self, is_so: Callable[[], bool], seconds: float = 100) -> bool:
        """False when the run ends first, or it takes too long."""
        end = time.monotonic() + seconds
        while not is_so():
            if self.process.poll() is not None or time.monotonic() > end:
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
            if not self.wait(lambda: len(injuries.ranks(self.run)) == 2):
                return False
            time.sleep(chance.uniform(0, 6))
            return self.process.poll() is None
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

    def ended(self) -> bool:
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
    faults, starts = [], [Start(run, steps)]
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
        starts.append(Start(run, steps))
    while not starts[-1].ended() and len(starts) < len(faults) + 4:  # a full disk may have ended it
        starts.append(Start(run, steps))
    for fault, start in zip(faults, starts[1:], strict=False):
        fault.seconds_to_resume = start.first_step - start.began if start.first_step else 0.0
    faults = [fault for fault in faults if fault.what]
    judge(original, run, faults, steps)
    return faults


def live_in_slurm(
    original: Path, run: Path, kinds: Iterable[str], chance: random.Random, cluster: Cluster
) -> list[Fault]:
    """A life as jobs of a cluster."""
    faults: list[Fault] = []
    for kind in kinds:
        job = Job(cluster, run, settings=settings(STEPS))
        step = chance.randrange(2, 60)
        job.wait(lambda job=job, step=step: f"\nstep {step}/" in job.log or job.state() == "COMPLETED", "a step")
        if job.state() == "COMPLETED":
            break
        what, began = CLUSTER[kind](cluster, chance), time.monotonic()
        if left := not has_ended(job):
            what += f"; job {job.state()} because of {job.state('Reason')}"
            set_right(cluster, job)
        what += f"; job {job.state()}, started again {job.state('Restarts')} times"
        faults.append(Fault(kind, "step", what, time.monotonic() - began, left_over=left))
        if "going on" in job.log:
            faults[-1].what += " and went on"
    while not (run_dir(run) / "model").is_dir():
        Job(cluster, run, settings=settings(STEPS)).end()
    judge(original, run, faults, STEPS)
    return faults


def has_ended(job: Job) -> bool:
    """False where Slurm holds it, or it takes too long."""
    try:
        job.wait(lambda: job.has_ended() or "held" in job.state("Reason"), "the end", 2 * SECONDS_TO_END)
    except AssertionError:
        return False
    return job.has_ended()


def set_right(cluster: Cluster, job: Job) -> None:
    """What an administrator does for nodes that Slurm drained, and for the job that it holds."""
    print(cluster.said("h1", "sinfo", "--long", "--Node"), flush=True)
    for host in cluster.hosts:
        cluster.on(host, "scontrol", "update", f"nodename={host}", "state=resume")
    cluster.on("h1", "scontrol", "release", job.number)
    if not has_ended(job):
        cluster.said("h1", "scancel", job.number)


def judge(original: Path, run: Path, faults: list[Fault], steps: int) -> None:
    before, after = masters(original, steps), masters(run, steps)
    equal = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    expected, found = ([row for row in metrics(r) if "loss/training" in row] for r in (original, run))
    keys = ("step", "loss/training", "optimizer/gradient_norm")
    trained = [tuple(row[key] for key in keys) for row in found]
    wanted = [tuple(row[key] for key in keys) for row in expected]
    for fault in faults:
        fault.equal = equal
        fault.steps_otherwise = len(trained) - len(set(trained) & set(wanted))
        fault.steps_unreported = len(set(wanted) - set(trained))


def plan(number: int) -> list[str]:
    """The faults of a life: on this machine; every fifth life is in Slurm, and meets one."""
    chance, fifth = random.Random(number), number // EVERY
    if is_in_slurm(number):
        return [list(CLUSTER)[fifth % len(CLUSTER)]]
    kinds = [*KILLS] * 2 + ["kill -9 of a rank"] * 3 + ["kill -9 of a launcher"] * 2 + [*DAMAGES] * 2
    kinds.remove("SIGSTOP of a rank")  # half a minute each
    return [chance.choice(kinds) for _ in range(FAULTS_OF_A_LIFE)]


def is_in_slurm(number: int) -> bool:
    return number % EVERY == EVERY - 1


def known() -> dict[int, list[Fault]]:
    rows = kept_rows(KNOWN, {**versions(), "code": code_digest()})
    return {row["life"]: [Fault(**fault) for fault in row["faults"]] for row in rows}


def table(faults: list[Fault]) -> str:
    lines = [
        "| fault | number | went on bit-equal | steps otherwise | unreported | left | seconds to end | to resume |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for kind in [*KILLS, *DAMAGES, *CLUSTER]:
        some = [fault for fault in faults if fault.kind == kind]
        if not some:
            continue
        ends, resumes = [f.seconds_to_end for f in some], [f.seconds_to_resume for f in some if f.seconds_to_resume]
        lines.append(
            f"| {kind} | {len(some)} | {sum(f.equal for f in some)} | {sum(f.steps_otherwise for f in some)} | "
            f"{sum(f.steps_unreported for f in some)} | {sum(f.left_over for f in some)} | {spread(ends)} | "
            f"{spread(resumes)} |"
        )
    equal, halves = sum(f.equal for f in faults), sum(f.half_saved for f in faults)
    lines.append("")
    lines.append(
        f"{len(faults)} faults, {equal} continued to bit-equal weights; {halves} struck while a checkpoint was half "
        "written. Steps otherwise: trained twice, or with another loss or gradient norm than the uninterrupted run's; "
        "unreported: missing in the curves. Left: runs that had not ended after "
        f"{SECONDS_TO_END} s, or trained on to the end, and jobs that Slurm held until they were released by hand. To "
        "end: from the fault until no process of the run was left "
        "(in Slurm: until the job's end, with what it did when it was started again); to resume: from the next start "
        "to its first step. Seconds are median (largest)."
    )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({max(values):.1f})" if values else ""


def write_summary(faults: list[Fault]) -> None:
    moments = {moment: sum(f.moment == moment for f in faults) for moment in dict.fromkeys(f.moment for f in faults)}
    told = ", ".join(f"{number} at {moment}" for moment, number in moments.items())
    SUMMARY.write_text(
        f"# Faults\n\nMade by `python -m benchmarks.faults`: runs of {STEPS} steps, a checkpoint each 10, injured at "
        f"random moments ({told}) and started again. {circumstances(2, 'cpu')}.\n\n{table(faults)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--faults", type=int, default=100, help="stop when so many are known")
    parser.add_argument("--no-cluster", action="store_true")
    args = parser.parse_args()
    end, lives = time.monotonic() + 60 * args.minutes, known()
    with_cluster = not (args.no_cluster or missing() or forbidden())
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as folder:
        original = run_file(Path(folder) / "original")
        launched.train_by_command(original, *settings(STEPS), "train.hang_minutes=30")  # DeepSpeed may compile
        number = 0
        while time.monotonic() < end and sum(map(len, lives.values())) < args.faults:
            if number not in lives and (with_cluster or not is_in_slurm(number)):
                faults = one_life(number, original, fresh(original, Path(folder) / f"life{number}"))
                lives[number] = faults
                keep(KNOWN, [{"life": number, "faults": [asdict(fault) for fault in faults]}])
                for fault in faults:
                    print(fault, flush=True)
                write_summary([fault for life in lives.values() for fault in life])
            number += 1
    print(table([fault for life in lives.values() for fault in life]))


def one_life(number: int, original: Path, run: Path) -> list[Fault]:
    chance, kinds = random.Random(f"life {number}"), plan(number)
    if kinds[0] not in injuries.CLUSTER:
        return live(original, run, kinds, chance)
    with Cluster(run.parent / "cluster") as cluster:
        return live_in_slurm(original, run, kinds, chance, cluster)


if __name__ == "__main__":
    main()
