"""Asks Slurm to requeue the job of this run, that is, to start it again.

In: the environment of a job. Out: a sentence for the user about what Slurm will do. Rank 0 asks after the last save.
An exit code that the batch script turns into a requeue would not do: the exit of the first rank kills the others, and
Slurm does not requeue a preempted job that exits with 0. A job that Slurm is already ending is left alone.

Only a job with SORTED_DS_REQUEUE=1 is requeued, which the job scripts set: other jobs are interactive sessions, or
hold more than this run.
"""

import re
import subprocess
import time
from collections.abc import Mapping

from sorted_ds.base.errors import UserError

SECONDS_TO_ANSWER = 30
NUM_TRIES, SECONDS_BETWEEN_TRIES = 6, 15.0
"""Slurm's controller may be busy, or another one may be taking over."""
FINAL_REFUSALS = ("batch jobs", "disabled")
"""Slurm always answers so for jobs of salloc, and for jobs that were submitted with --no-requeue."""
REQUEUE_VARIABLE = "SORTED_DS_REQUEUE"
REQUEUABLE_STATES = ("RUNNING", "PREEMPTED", "SUSPENDED")
"""A job that the user cancelled is in another state."""


def requeue(environment: Mapping[str, str]) -> str:
    """Asks Slurm to requeue the job, and returns a sentence about the result; "" if there is no job to requeue.

    Raises: UserError when Slurm cannot be asked, or refuses.
    """
    job = requeuable_job(environment)
    if not job:
        return ""
    for number in range(1, NUM_TRIES + 1):
        is_known, state = _run("squeue", "--noheader", "--jobs", job, "--format", "%T")
        if is_known and state not in REQUEUABLE_STATES:
            return f"Slurm is already ending job {job} ({state or 'gone'}) and decides whether to start it again"
        is_requeued, answer = _run("scontrol", "requeue", job)
        if is_requeued:
            return f"Slurm starts job {job} again"
        if number == NUM_TRIES or any(refusal in answer for refusal in FINAL_REFUSALS):
            break
        time.sleep(SECONDS_BETWEEN_TRIES)
    raise UserError(f"Slurm did not requeue job {job}: {answer}. Submit it again to resume from the last checkpoint.")


def is_preempted(environment: Mapping[str, str]) -> bool:
    """Returns whether the job can be requeued and is being preempted.

    A signal alone does not tell: launchers send the same signal to ranks for other reasons.
    """
    job = requeuable_job(environment)
    works, answer = _run("scontrol", "show", "job", job) if job else (False, "")
    return works and bool(re.search(r"\bPreemptTime=\d", answer))


def requeuable_job(environment: Mapping[str, str]) -> str:
    """Returns the number of the job that may be requeued; "" if there is none.

    For a job array this is ARRAY_TASK, because SLURM_JOB_ID of one of its tasks is the number of the whole array.
    """
    if environment.get(REQUEUE_VARIABLE) != "1":
        return ""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID", "")


def _run(*command: str) -> tuple[bool, str]:
    """Returns whether the command worked, and its output or the error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS_TO_ANSWER)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, (done.stderr if done.returncode else done.stdout).strip()
