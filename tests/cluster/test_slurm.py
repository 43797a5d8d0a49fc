"""A job of a real Slurm on two nodes loses nothing when it is signalled, preempted, stopped or cancelled."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.machines import Cluster
from tests.launched import ROOT, SETTINGS, copied, masters, metrics, run_dir, train
from tests.runs import run_file

pytestmark = pytest.mark.long

STEPS = 40
LONGER = [*SETTINGS, f"train.steps={STEPS}", "checkpoint.every_steps=10", "eval.every_steps=0"]
SHORT = [*SETTINGS, "train.steps=2"]
SECONDS = 120


@pytest.fixture(scope="module")
def longer(tmp_path_factory) -> Path:
    """Returns the run file of an uninterrupted run on this machine, which is long enough to be interrupted."""
    run = run_file(tmp_path_factory.mktemp("longer"))
    train(run, *LONGER)
    return run


@pytest.fixture
def run(longer, shared_folder) -> Path:
    return copied(longer, shared_folder / 'it\'s "$(touch pwned)"', keep_steps=0)


class Job:
    """A run that was submitted as a job."""

    def __init__(
        self,
        cluster: Cluster,
        run: Path,
        script: str = "",
        settings: Sequence[str] = LONGER,
        partition: str = "main",
        options: Sequence[str] = (),
    ):
        """Submits with `sorted-ds launch`, or if `script` is given, with that script of launch/."""
        self.cluster, self.run = cluster, run
        if script:
            log = f"--output={run_dir(run)}/slurm-%j.log"
            sizes = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10:00", f"--partition={partition}"]
            command = [
                "sbatch",
                "--parsable",
                *sizes,
                *options,
                log,
                str(ROOT / "launch" / script),
                str(run),
                *settings,
            ]
            self.number = cluster.output("h1", *command)
            return
        command = [
            "sorted-ds",
            "launch",
            "slurm",
            str(run),
            *settings,
            "--nodes",
            "2",
            "--gpus-per-node",
            "1",
            "--no-gpus",
            f"--sbatch=partition={partition}",
        ]
        self.number = cluster.output("h1", *command, "--time", "10:00").splitlines()[-1]

    @property
    def log(self) -> str:
        path = run_dir(self.run) / f"slurm-{self.number}.log"
        return path.read_text() if path.exists() else ""

    def state(self, field: str = "JobState") -> str:
        shown = self.cluster.output("h1", "scontrol", "show", "job", self.number)
        found = re.search(rf"{field}=(\S+)", shown)
        return found[1] if found else ""

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what} did not come: {self.state()}\n{self.log}"
            time.sleep(0.1)

    def reach_step(self, step: int) -> None:
        self.wait(lambda: f"\nstep {step}/" in self.log, f"step {step}")

    def has_ended(self) -> bool:
        return self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def end(self, seconds: float = SECONDS) -> str:
        self.wait(self.has_ended, "the end", seconds)
        return self.state()


def assert_same(longer: Path, run: Path) -> None:
    """Compares the weights bit for bit, and checks that each step was reported once."""
    before, after = masters(longer, STEPS), masters(run, STEPS)
    assert all(torch.equal(before[name], after[name]) for name in before)
    steps = [row["step"] for row in metrics(run) if "loss/training" in row]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.ci
def test_a_signalled_job_saves_and_is_requeued_and_ends_bit_equal(cluster, longer, run):
    job = Job(cluster, run)
    job.reach_step(5)
    cluster.output("h1", "scancel", "--signal=USR1", job.number)
    assert job.end() == "COMPLETED", job.log
    assert job.state("Restarts") == "1"
    assert f"SIGUSR1; Slurm starts job {job.number} again" in job.log
    assert "resuming from the checkpoint of step" in job.log
    assert_same(longer, run)


@pytest.mark.ci
def test_a_signalled_job_of_the_deepspeed_launcher_resumes_too(cluster, longer, run):
    job = Job(cluster, run, "slurm_deepspeed.sbatch")
    job.reach_step(5)
    cluster.output("h1", "scancel", "--signal=USR1", job.number)
    assert job.end() == "COMPLETED", job.log
    assert job.state("Restarts") == "1"
    assert_same(longer, run)


@pytest.mark.parametrize("script", ["", "slurm_deepspeed.sbatch"])
def test_a_preempted_job_saves_and_is_requeued_and_ends_bit_equal(cluster, longer, run, script):
    job = Job(cluster, run, script)
    job.reach_step(5)
    preempt(cluster)
    assert job.end() == "COMPLETED", job.log
    assert job.state("Restarts") == "1"
    assert "SIGTERM; Slurm starts job" in job.log
    assert_same(longer, run)


def test_a_job_that_is_preempted_while_it_starts_is_requeued(cluster, longer, run):
    job = Job(cluster, run)
    ranks = ("pgrep", "-f", "sorted_ds.commands.rank")
    job.wait(lambda: all(cluster.on(host, *ranks).stdout for host in cluster.hosts), "the ranks")
    time.sleep(1)  # by now Python runs and imports
    preempt(cluster)
    assert job.end() == "COMPLETED", job.log
    assert job.state("Restarts") == "1"
    assert f"preempted before the first step; Slurm starts job {job.number} again" in job.log
    assert_same(longer, run)


def changed_script(run: Path, old: str, new: str) -> str:
    """Writes `launch/slurm.sbatch` with one text replaced, and returns its path."""
    script = (ROOT / "launch" / "slurm.sbatch").read_text()
    assert script.count(old) == 1
    path = run.parent / "changed.sbatch"
    path.write_text(script.replace(old, new))
    return str(path)


def test_a_job_that_is_preempted_before_it_has_ranks_is_requeued(cluster, longer, run):
    """Slurm signals only tasks, and while the batch script prepares there are none."""
    preempted = "scontrol show job $SLURM_JOB_ID | grep -q 'PreemptTime=2'"
    waiting = f'until [ "${{SLURM_RESTART_COUNT:-0}}" != 0 ] || {preempted}; do sleep 0.2; done'
    script = changed_script(run, "\nsrun ", f"\n{waiting}\nsrun ")
    job = Job(cluster, run, script, options=["--ntasks-per-node=1"])
    job.wait(lambda: job.state() == "RUNNING", "the job")
    preempt(cluster)
    assert job.end() == "COMPLETED", job.log
    assert job.state("Restarts") == "1"
    assert f"preempted before the first step; Slurm starts job {job.number} again" in job.log
    assert_same(longer, run)


def test_a_job_whose_rank_fails_at_once_is_not_requeued(cluster, run):
    """Slurm then signals rank 0, as in a preemption. If it were taken for one, the job would be requeued for ever."""
    failing = (
        "bash -c '[ $SLURM_PROCID = 0 ] || { sleep 10; exit 7; }; exec python -m sorted_ds.commands.rank \"$@\"' rank"
    )
    script = changed_script(run, "python -m sorted_ds.commands.rank", failing)
    job = Job(cluster, run, script, options=["--ntasks-per-node=1"])
    assert job.end() == "FAILED", job.log
    assert job.state("Restarts") == "0"
    time.sleep(8)  # a requeued job would start by now
    assert job.state() == "FAILED", job.log


def test_an_array_trains_a_run_for_each_seed_and_a_dependent_job_follows(cluster, run):
    one_node = ["--nodes=1", "--ntasks-per-node=1"]
    array = Job(cluster, run, "slurm.sbatch", SHORT, options=[*one_node, "--array=0-1"])
    after = Job(cluster, run, "slurm.sbatch", SHORT, options=[*one_node, f"--dependency=afterany:{array.number}"])
    after.wait(lambda: after.state() == "RUNNING", "the job after the array")
    found = [load_file(run_dir(run).parent / f"{run.stem}-{seed}" / "model" / "model.safetensors") for seed in (0, 1)]
    assert not torch.equal(*(weights["model.norm.weight"] for weights in found))
    assert after.end() == "COMPLETED", after.log


def preempt(cluster: Cluster) -> None:
    """Submits a job with a higher priority, for which Slurm preempts the jobs on both nodes."""
    command = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 2"]
    cluster.output("h1", *command)


@pytest.mark.parametrize("script", ["", "slurm_deepspeed.sbatch"])
def test_a_job_that_is_preempted_without_grace_time_saves_and_is_requeued(cluster, longer, run, script):
    """Most sites have no GraceTime: Slurm ends and requeues the job by itself, and waits for KillWait in between."""
    job = Job(cluster, run, script, partition="at_once")
    job.reach_step(5)
    preempt(cluster)
    assert job.end() == "COMPLETED", job.log
    assert job.state("Restarts") == "1"
    if cluster.has_cgroups:
        assert re.search(r"SIGTERM; Slurm is already ending job \d+ \(COMPLETING\) and decides whether", job.log), (
            job.log
        )
        assert "resuming from the checkpoint of step" in job.log
    assert_same(longer, run)


def test_a_cancelled_job_is_not_requeued(cluster, run):
    job = Job(cluster, run)
    job.reach_step(5)
    cluster.output("h1", "scancel", job.number)
    assert job.end() == "CANCELLED", job.log
    time.sleep(8)  # a requeued job would start by now
    assert job.state() == "CANCELLED"


def test_a_touched_stop_file_ends_the_job_and_the_next_job_resumes(cluster, longer, run):
    job = Job(cluster, run)
    job.reach_step(5)
    (run_dir(run) / "stop").touch()
    assert job.end() == "COMPLETED", job.log
    assert "the file stop; start the run again to resume" in job.log
    assert not (run_dir(run) / "stop").exists()
    assert Job(cluster, run).end() == "COMPLETED"
    assert_same(longer, run)


@pytest.mark.ci
def test_a_killed_rank_is_named_and_ends_the_job_within_seconds(cluster, run):
    job = Job(cluster, run)
    job.reach_step(5)
    start = time.monotonic()
    cluster.on("h2", "pkill", "-9", "-f", "sorted_ds.commands.rank")
    assert job.end() == "FAILED"
    assert time.monotonic() - start < 30
    assert "rank 1" in job.log
    for host in cluster.hosts:
        assert cluster.on(host, "pgrep", "-f", "sorted_ds.commands.rank").stdout == ""
