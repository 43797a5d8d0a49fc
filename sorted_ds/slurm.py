"""What a run asks of Slurm: to start its job again.

In: the environment of a job. Out: a sentence for the user. Asked by rank 0 after the last save. An exit code that the
batch script turns into a requeue is racy, because the first rank's exit kills the others; and a job that exits 0 while
it is being preempted is completed, not requeued. A job that Slurm is ending already is let go.
"""

import subprocess
import time
from collections.abc import Mapping

from sorted_ds.errors import UserError

SECONDS = 30
TRIES, SECONDS_BETWEEN = 6, 15.0
"""The controller may be busy, or another one taking over."""
GOES_ON = ("RUNNING", "PREEMPTED", "SUSPENDED")
"""States of a job that may be started again; one that the user cancelled is in another."""


def requeue(environment: Mapping[str, str]) -> str:
    """Asks for the job to be started again. Returns what came of it; empty outside of Slurm.

    Raises: UserError when Slurm cannot be asked, or refuses.
    """
    job = job_of(environment)
    if not job:
        return ""
    for number in range(TRIES):
        works, state = _run("squeue", "--noheader", "--jobs", job, "--format", "%T")
        if works and state not in GOES_ON:
            return f"Slurm is ending job {job} ({state or 'gone'}), and knows whether it starts it again"
        works, told = _run("scontrol", "requeue", job)
        if works:
            return f"Slurm starts job {job} again"
        time.sleep(SECONDS_BETWEEN if number < TRIES - 1 else 0)
    raise UserError(f"job {job} could not be started again: {told}. Submit it again to go on from the last checkpoint.")


def job_of(environment: Mapping[str, str]) -> str:
    """Its number; empty outside of Slurm. Of an array, this task: one of its tasks has the number of the whole."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID", "")


def _run(*command: str) -> tuple[bool, str]:
    """Whether it worked, and what it said: its output, or what went wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, (done.stderr if done.returncode else done.stdout).strip()
