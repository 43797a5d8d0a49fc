"""What a run asks of Slurm: to start its job again.

In: the environment of a job. Out: a sentence for the user. Asked by rank 0 after the last save. An exit code that the
batch script turns into a requeue is racy, because the first rank's exit kills the others; and a job that exits 0 while
it is being preempted is completed, not requeued. A job that is being cancelled is let go.
"""

import subprocess
from collections.abc import Mapping

SECONDS = 30
GOES_ON = ("RUNNING", "PREEMPTED", "SUSPENDED")
"""States of a job that may be started again; one that the user cancelled is in another."""


def requeue(environment: Mapping[str, str]) -> str:
    """Asks for the job to be started again. Returns what came of it; empty outside of Slurm."""
    job = _job(environment)
    if not job:
        return ""
    works, state = _run("squeue", "--noheader", "--jobs", job, "--format", "%T")
    if works and state not in GOES_ON:
        return f"job {job} is {state or 'gone'}, so it is not started again"
    works, told = _run("scontrol", "requeue", job)
    return f"Slurm starts job {job} again" if works else f"job {job} could not be started again: {told}"


def _job(environment: Mapping[str, str]) -> str:
    """Of an array, this task alone: one of its tasks has the number of the whole."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID", "")


def _run(*command: str) -> tuple[bool, str]:
    """Whether it worked, and what it said: its output, or what went wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, (done.stderr if done.returncode else done.stdout).strip()
