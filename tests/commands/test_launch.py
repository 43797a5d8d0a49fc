"""`sorted-ds launch slurm` writes the job script, submits it, and reports Slurm's refusal as one error."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sorted_ds.commands.cli import main
from tests.launched import ROOT, run_dir
from tests.runs import run_file

SCRIPTS = sorted((ROOT / "launch").glob("*.sbatch")) + sorted((ROOT / "launch").glob("*.sh"))


@pytest.fixture
def run(tmp_path) -> Path:
    return run_file(tmp_path / "a run's $(touch oops) folder")


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Path:
    """Replaces the program sbatch, which is real in tests/cluster. Returns the file where it writes its arguments."""
    received = tmp_path / "received"
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{received}"\necho "42;cluster"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return received


def script_of(run: Path) -> str:
    return (run_dir(run) / "slurm.sbatch").read_text()


def test_a_dry_run_writes_the_script_and_submits_nothing(run, sbatch, capsys):
    assert main(["launch", "slurm", str(run), "--nodes", "2", "--time", "4:00:00", "--dry-run"]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir(run) / "slurm.sbatch")
    assert not sbatch.exists()
    for line in ("--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=8", "--time=4:00:00", "--signal=USR1@300"):
        assert f"#SBATCH {line}\n" in script_of(run)


def test_a_short_job_is_signalled_after_three_quarters_of_its_time(run, sbatch):
    assert main(["launch", "slurm", str(run), "--time", "10:00"]) == 0
    assert "#SBATCH --signal=USR1@150\n" in script_of(run)


def test_more_tasks_than_gpus_on_a_node_are_an_error_before_anything_starts():
    sizes = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "4"}
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), "my.toml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **sizes})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "error: a node has 8 tasks but 4 GPUs. Give sbatch the same number as" in done.stderr


def test_a_job_is_submitted_and_its_number_is_printed(run, sbatch, capsys):
    arguments = ["--after", "41", "--sbatch=--partition=a100", "--sbatch", "account=us", "--gpus-per-node", "4"]
    assert main(["launch", "slurm", str(run), "train.steps=5", *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == "42"
    assert all(word in printed.err for word in ("squeue --jobs 42", "scancel --signal=USR1 42", "slurm-42.log"))
    assert sbatch.read_text().splitlines() == [
        "--parsable",
        "--dependency=afterany:41",
        str(run_dir(run) / "slurm.sbatch"),
    ]
    assert "#SBATCH --partition=a100\n#SBATCH --account=us\n" in script_of(run)
    assert "#SBATCH --ntasks-per-node=4\n" in script_of(run)


def test_a_job_on_cpus_requests_no_gpu(run, sbatch):
    assert main(["launch", "slurm", str(run), "--no-gpus", "--gpus-per-node", "2"]) == 0
    assert not re.search(r"(?m)^(#SBATCH|srun).*gpus-per-node", script_of(run))


def test_the_script_passes_arguments_on_unchanged(run, sbatch, tmp_path):
    """The shell must not interpret spaces, quotes and `$(...)` in a path."""
    main(["launch", "slurm", str(run), "optim.name=sgd", "--extend-space", "--dry-run"])
    settings = ["optim.name=sgd", "checkpoint.extend_space=true"]
    prepare, srun = arguments_of(run_dir(run) / "slurm.sbatch", tmp_path)
    assert prepare == ["prepare", str(run), *settings]
    assert srun[-3:] == [str(run), *settings]
    assert not (tmp_path / "oops").exists()


def arguments_of(script: Path, folder: Path, *arguments: str, **environment: str) -> tuple[list[str], list[str]]:
    """Runs a job script and returns the arguments that it passes to `sorted-ds` and to `srun`."""
    programs = folder / "programs"
    programs.mkdir()
    for name in ("sorted-ds", "srun"):
        (programs / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{programs}/{name}.arguments"\n')
        (programs / name).chmod(0o755)
    env = {**os.environ, **environment, "PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(script), *arguments], check=True, cwd=folder, env=env)
    prepare, srun = ((programs / f"{name}.arguments").read_text().splitlines() for name in ("sorted-ds", "srun"))
    return prepare, srun


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ([], ["seed=3", "run_dir=runs/{name}-{seed}"]),
        (["run_dir=/my/place-{seed}"], ["seed=3"]),
        (["seed=7"], ["run_dir=runs/{name}-{seed}"]),
    ],
)
def test_a_task_of_an_array_adds_the_seed_and_the_run_dir_that_the_user_has_not_set(tmp_path, given, added):
    script = ROOT / "launch" / "slurm.sbatch"
    prepare, _ = arguments_of(script, tmp_path, "my.toml", *given, SLURM_ARRAY_TASK_ID="3")
    assert prepare == ["prepare", "my.toml", *given, *added]


def test_prepare_accepts_the_arguments_that_the_scripts_pass_to_it(run):
    assert main(["prepare", str(run), "--time-limit", "90", "--extend-space"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time", "soon"], r"error: --time = 'soon' should be like"),
        (["--sbatch=--array=0-3"], r"error: --sbatch cannot take --array, because an array is several runs"),
        (["--sbatch=-p a100"], r"error: --sbatch '-p a100' should be a long option of sbatch"),
        ([r"run_dir=a\b"], r"error: '.*' cannot be written into a job script"),
        (["optim.name=adam"], r"error: .*optim.name = 'adam' should be"),
    ],
)
def test_mistakes_are_reported_before_anything_is_written(run, sbatch, capsys, arguments, message):
    assert main(["launch", "slurm", str(run), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not run_dir(run).exists()


def test_a_job_does_not_inherit_ds_accelerator_from_a_machine_without_gpu(run, sbatch):
    (sbatch.parent / "bin" / "sbatch").write_text(f'#!/bin/sh\nenv > "{sbatch}"\necho 42\n')
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    script = "import sys; from sorted_ds.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", script, "launch", "slurm", str(run)], check=True, env=environment, cwd=ROOT)
    assert "DS_ACCELERATOR" not in sbatch.read_text()


def test_a_refusal_of_slurm_is_reported(run, sbatch, capsys):
    (sbatch.parent / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    assert main(["launch", "slurm", str(run)]) == 2
    assert "sbatch refused the job: sbatch: error: invalid partition" in capsys.readouterr().err


def test_without_slurm_the_error_says_where_to_run_the_command(run, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", "slurm", str(run)]) == 2
    assert "Run this on a login node" in capsys.readouterr().err


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_each_script_is_valid_shell_and_shows_its_usage(path):
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert f"launch/{path.name}" in path.read_text()
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 2, done.stderr
