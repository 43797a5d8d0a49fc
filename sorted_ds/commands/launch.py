"""`sorted-ds launch slurm`: checks the run file, writes the job's script into RUN_DIR, and submits it."""

import argparse
import re
import shlex
import subprocess
from importlib.resources import files
from pathlib import Path

from rich.console import Console

from sorted_ds.base.errors import UserError
from sorted_ds.cluster.launcher import environment_for_others
from sorted_ds.cluster.stop import seconds_of
from sorted_ds.run.build import check_run
from sorted_ds.run.config import Run
from sorted_ds.run.run_file import load_run

SCRIPT = "slurm.sbatch"
SECONDS_TO_SAVE = 300


def run(args: argparse.Namespace) -> int:
    settings = load_run(args.run_file, args.overrides)
    check_run(settings)
    path = written(job_script(args, settings), settings.run_dir / SCRIPT)
    command = ["sbatch", "--parsable", *([f"--dependency=afterany:{args.after}"] if args.after else []), str(path)]
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"wrote {path}: {args.nodes} x {args.gpus_per_node} ranks", markup=False)
    if args.dry_run:
        console.print(f"submit it with: {shlex.join(command)}", markup=False)
        print(path)
        return 0
    job = submit(command)
    console.print(f"submitted job {job}", markup=False)
    for what, how in following(job, settings):
        console.print(f"  {what:22}{how}", markup=False)
    print(job)
    return 0


def written(text: str, path: Path) -> Path:
    """Raises: UserError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}. Set another run_dir.") from None
    return path


def job_script(args: argparse.Namespace, settings: Run) -> str:
    """The job script with this run's numbers and arguments. It can be submitted again by itself."""
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
    given = [_long(option) for option in args.sbatch]
    if any(option.startswith("--array") for option in given):
        raise UserError("an array is several runs: call `sbatch --array 0-3 launch/slurm.sbatch RUN.toml`.")
    text = files("sorted_ds.cluster").joinpath("jobs", SCRIPT).read_text()
    for name, value in options.items():
        head, _, tail = re.split(rf"(#SBATCH --{name}=.*\n)", text, maxsplit=1)
        text = head + (f"#SBATCH --{name}={_quoted(value)}\n" if value else "") + tail
    more = "".join(f"#SBATCH {_option(option)}\n" for option in given)
    text = text.replace("\nset -euo pipefail\n", f"{more}\nset -euo pipefail\n", 1)
    arguments = shlex.join([str(args.run_file.absolute()), *args.overrides])
    first, usage, rest = text.partition("if [ $# = 0 ]")
    return f'{first}set -- {arguments} "$@"\n{usage}{rest}'


def seconds_to_save(time_limit: str) -> int:
    """How long before the limit Slurm tells the run: five minutes, or a quarter of a short job.

    Raises: UserError for a limit that is none.
    """
    return min(SECONDS_TO_SAVE, int(seconds_of(time_limit, "--time") / 4))


def _long(option: str) -> str:
    """Raises: UserError for what is not `--name` or `--name=value`; the hyphens may be left out."""
    if not re.fullmatch(r"(--)?[a-z][\w-]+(=.*)?", option):
        raise UserError(f"--sbatch {option!r} should be a long option of sbatch, like --sbatch=--partition=a100.")
    return f"--{option.removeprefix('--')}"


def _option(text: str) -> str:
    name, equals, value = text.partition("=")
    return f"{name}{equals}{_quoted(value)}"


def _quoted(value: str) -> str:
    """For an #SBATCH line. Raises: UserError for what it cannot hold. Source: Slurm 22.05, src/sbatch/opt.c."""
    if "\n" in value or "\\" in value:
        raise UserError(f"{value!r} cannot be written into a job script. Name it without backslashes and line breaks.")
    return '"' + value.replace('"', '\\"') + '"' if re.search(r"[^\w@%+=:,./-]", value) else value


def submit(command: list[str]) -> str:
    """The job's number. Raises: UserError with what Slurm said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment_for_others())
    except FileNotFoundError:
        raise UserError("sbatch is not installed here. Call this on a login node of the cluster.") from None
    if done.returncode:
        raise UserError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def following(job: str, settings: Run) -> list[tuple[str, str]]:
    """What a user wants to do next."""
    folder = shlex.quote(str(settings.run_dir))
    return [
        ("state", f"squeue --jobs {job}"),
        ("output", f"tail -F {shlex.quote(str(settings.run_dir / f'slurm-{job}.log'))}"),
        ("curves", f"tensorboard --logdir {folder}/tensorboard"),
        ("save and start again", f"scancel --signal=USR1 {job}"),
        ("save and end", f"touch {folder}/stop"),
    ]
