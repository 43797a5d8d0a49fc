"""What a run asks of Slurm: to start its job again.

In: the environment of a job. Out: a sentence for the user. Asked by rank 0 after the last save. An exit code that the
batch script turns into a requeue is racy, because the first rank's exit kills the others; and a job that exits 0 while
it is being preempted is completed, not requeued. A job that Slurm is ending already is let go.

Only a job that says so is started again (`SORTED_DS_REQUEUE=1`, as the job scripts do): others are people's
sessions, or hold more than this run.
"""

import re
import subprocess
import time
from collections.abc import Mapping

from sorted_ds.base.errors import UserError

SECONDS = 30
TRIES, SECONDS_BETWEEN = 6, 15.0
"""The controller may be busy, or another one taking over."""
REFUSALS = ("batch jobs", "disabled")
"""Told for ever: by salloc's jobs, and by those that were submitted with --no-requeue."""
ASKED_FOR = "SORTED_DS_REQUEUE"
GOES_ON = ("RUNNING", "PREEMPTED", "SUSPENDED")
"""States of a job that may be started again; one that the user cancelled is in another."""


def requeue(environment: Mapping[str, str]) -> str:
    """Asks for the job to be started again. Returns what came of it; empty where there is none that may be.

    Raises: UserError when Slurm cannot be asked, or refuses.
    """
    job = job_of(environment)
    if not job:
        return ""
    for number in range(1, TRIES + 1):
        works, state = _run("squeue", "--noheader", "--jobs", job, "--format", "%T")
        if works and state not in GOES_ON:
            return f"Slurm is ending job {job} ({state or 'gone'}), and knows whether it starts it again"
        works, told = _run("scontrol", "requeue", job)
        if works:
            return f"Slurm starts job {job} again"
        if number == TRIES or any(refusal in told for refusal in REFUSALS):
            break
        time.sleep(SECONDS_BETWEEN)
    raise UserError(f"job {job} could not be started again: {told}. Submit it again to go on from the last checkpoint.")


def is_preempted(environment: Mapping[str, str]) -> bool:
    """Whether the job may be started again and is in its grace time. Launchers signal ranks for other reasons too."""
    job = job_of(environment)
    works, told = _run("scontrol", "show", "job", job) if job else (False, "")
    return works and bool(re.search(r"\bPreemptTime=\d", told))


def job_of(environment: Mapping[str, str]) -> str:
    """The number of the job that may be started again; empty where there is none. Of an array, this task: one of its
    tasks has the number of the whole.
    """
    if environment.get(ASKED_FOR) != "1":
        return ""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID", "")


def _run(*command: str) -> tuple[bool, str]:
    """Whether it worked, and what it said: its output, or what went wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, (done.stderr if done.returncode else done.stdout).strip()
