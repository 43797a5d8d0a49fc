"""`sorted-ds launch slurm`: checks the run file, writes the job script into RUN_DIR and submits it.

In: a run file and the numbers of the job. On disk: RUN_DIR/slurm.sbatch. Out: the number of the job on stdout, and on
stderr the commands that a user needs next.
"""

import argparse
import re
import shlex
import subprocess
from importlib.resources import files
from pathlib import Path

from rich.console import Console

from sorted_ds.base.errors import UserError
from sorted_ds.base.files import replaced
from sorted_ds.cluster.launcher import environment_of_jobs
from sorted_ds.cluster.stop import time_limit_seconds
from sorted_ds.run.checks import check_run, warnings_of
from sorted_ds.run.config import Run
from sorted_ds.run.run_file import load_run

SCRIPT = "slurm.sbatch"
SECONDS_TO_SAVE = 300


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code. Raises: UserError for what the user can correct."""
    settings = load_run(args.run_file, args.overrides)
    config, _ = check_run(settings)
    path = write_script(job_script(args, settings), settings.run_dir / SCRIPT)
    command = ["sbatch", "--parsable", *([f"--dependency=afterany:{args.after}"] if args.after else []), str(path)]
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for warning in warnings_of(settings, config):
        console.print(f"warning: {warning}", markup=False)
    console.print(f"wrote {path}: {args.nodes} x {args.gpus_per_node} ranks", markup=False)
    if args.dry_run:
        console.print(f"submit it with: {shlex.join(command)}", markup=False)
        print(path)
        return 0
    job = submit(command)
    console.print(f"submitted job {job}", markup=False)
    for purpose, next_command in next_commands(job, settings):
        console.print(f"  {purpose:22}{next_command}", markup=False)
    print(job)
    return 0


def write_script(text: str, path: Path) -> Path:
    """Writes the script and returns its path. Raises: UserError when it cannot be written."""
    try:
        with replaced(path) as hidden:
            hidden.write_text(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}. Set another run_dir.") from None
    return path


def job_script(args: argparse.Namespace, settings: Run) -> str:
    """Returns the job script with this run's numbers and arguments. It can be submitted again as it is.

    Raises: UserError for a time limit or an option that cannot stand in a script.
    """
    options = {
        "job-name": settings.run_dir.name,
        "nodes": str(args.nodes),
        "gpus-per-node": "" if args.no_gpus else str(args.gpus_per_node),
        "ntasks-per-node": str(args.gpus_per_node),
        "cpus-per-task": "1" if args.no_gpus else "8",
        "time": args.time,
        "signal": f"USR1@{seconds_to_save(args.time)}",
        "output": str(settings.run_dir).replace("%", "%%") + "/slurm-%j.log",
    }
    more_options = [_long_option(option) for option in args.sbatch]
    if any(option.startswith("--array") for option in more_options):
        raise UserError(
            "--sbatch cannot take --array, because an array is several runs. For an array call "
            "`sbatch --array 0-3 launch/slurm.sbatch RUN.toml`."
        )
    text = files("sorted_ds.cluster").joinpath("jobs", SCRIPT).read_text()
    for name, value in options.items():
        head, _, tail = re.split(rf"(#SBATCH --{name}=.*\n)", text, maxsplit=1)
        text = head + (_sbatch_line(f"--{name}={value}") if value else "") + tail
    more_lines = "".join(_sbatch_line(option) for option in more_options)
    text = text.replace("\nset -euo pipefail\n", f"{more_lines}\nset -euo pipefail\n", 1)
    arguments = shlex.join([str(args.run_file.absolute()), *args.overrides])
    first, usage, rest = text.partition("if [ $# = 0 ]")
    return f'{first}set -- {arguments} "$@"\n{usage}{rest}'


def seconds_to_save(time_limit: str) -> int:
    """Returns how long before the time limit Slurm signals the run: five minutes, or a quarter of a shorter job.

    Raises: UserError for a time limit that cannot be read.
    """
    return min(SECONDS_TO_SAVE, int(time_limit_seconds(time_limit, "--time") / 4))


def _long_option(option: str) -> str:
    """Returns `--name` or `--name=value`; the user may leave out the hyphens. Raises: UserError for anything else."""
    if not re.fullmatch(r"(--)?[a-z][\w-]+(=.*)?", option):
        raise UserError(f"--sbatch {option!r} should be a long option of sbatch, like --sbatch=--partition=a100.")
    return f"--{option.removeprefix('--')}"


def _sbatch_line(option: str) -> str:
    name, equals, value = option.partition("=")
    return f"#SBATCH {name}{equals}{_quoted(value)}\n"


def _quoted(value: str) -> str:
    """Returns the value as an #SBATCH line needs it. Source: Slurm 22.05, src/sbatch/opt.c.

    Raises: UserError for a value with a backslash or a line break, which such a line cannot hold.
    """
    if "\n" in value or "\\" in value:
        raise UserError(f"{value!r} cannot be written into a job script. Remove its backslashes and line breaks.")
    return '"' + value.replace('"', '\\"') + '"' if re.search(r"[^\w@%+=:,./-]", value) else value


def submit(command: list[str]) -> str:
    """Submits the job and returns its number. Raises: UserError with Slurm's message when Slurm refuses."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment_of_jobs())
    except FileNotFoundError:
        raise UserError("sbatch is not installed here. Run this on a login node of the cluster.") from None
    if done.returncode:
        raise UserError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def next_commands(job: str, settings: Run) -> list[tuple[str, str]]:
    """Returns what a user may want to do next: pairs of a purpose and a shell command."""
    folder = shlex.quote(str(settings.run_dir))
    return [
        ("state", f"squeue --jobs {job}"),
        ("output", f"tail -F {shlex.quote(str(settings.run_dir / f'slurm-{job}.log'))}"),
        ("curves", f"tensorboard --logdir {folder}/tensorboard"),
        ("save and requeue", f"scancel --signal=USR1 {job}"),
        ("save and stop", f"touch {folder}/stop"),
    ]
