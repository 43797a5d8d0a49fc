"""`sorted-ds launch slurm`: the script that it writes, what it submits, and what Slurm's refusal looks like."""

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
    """Stands in for the program of that name; tests/cluster has the real one. Where its arguments are written."""
    told = tmp_path / "told"
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{told}"\necho "42;cluster"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return told


def written(run: Path) -> str:
    return (run_dir(run) / "slurm.sbatch").read_text()


def test_a_dry_run_writes_the_script_and_submits_nothing(run, sbatch, capsys):
    assert main(["launch", "slurm", str(run), "--nodes", "2", "--time", "4:00:00", "--dry-run"]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir(run) / "slurm.sbatch")
    assert not sbatch.exists()
    for line in ("--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=8", "--time=4:00:00", "--signal=USR1@300"):
        assert f"#SBATCH {line}\n" in written(run)


def test_a_short_job_is_told_of_its_end_when_it_has_done_something(run, sbatch):
    assert main(["launch", "slurm", str(run), "--time", "10:00"]) == 0
    assert "#SBATCH --signal=USR1@150\n" in written(run)


def test_more_tasks_than_gpus_of_a_node_are_an_error_before_anything_starts():
    sizes = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "4"}
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), "my.toml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **sizes})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "error: 8 tasks for 4 GPUs of a node. Give sbatch the same number as" in done.stderr


def test_a_job_is_submitted_and_its_number_is_told(run, sbatch, capsys):
    arguments = ["--after", "41", "--sbatch=--partition=a100", "--sbatch", "account=us", "--gpus-per-node", "4"]
    assert main(["launch", "slurm", str(run), "train.steps=5", *arguments]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == "42"
    assert all(word in said.err for word in ("squeue --jobs 42", "scancel --signal=USR1 42", "slurm-42.log"))
    assert sbatch.read_text().splitlines() == [
        "--parsable",
        "--dependency=afterany:41",
        str(run_dir(run) / "slurm.sbatch"),
    ]
    assert "#SBATCH --partition=a100\n#SBATCH --account=us\n" in written(run)
    assert "#SBATCH --ntasks-per-node=4\n" in written(run)


def test_on_cpus_no_gpu_is_asked_for(run, sbatch):
    assert main(["launch", "slurm", str(run), "--no-gpus", "--gpus-per-node", "2"]) == 0
    assert not re.search(r"(?m)^(#SBATCH|srun).*gpus-per-node", written(run))


def test_the_scripts_shell_sees_the_arguments_as_they_are(run, sbatch, tmp_path):
    """Spaces, quotes and `$(...)` in a path are no code."""
    main(["launch", "slurm", str(run), "optim.name=sgd", "--extend-space", "--dry-run"])
    settings = ["optim.name=sgd", "checkpoint.extend_space=true"]
    prepare, srun = told_by(run_dir(run) / "slurm.sbatch", tmp_path)
    assert prepare == ["prepare", str(run), *settings]
    assert srun[-3:] == [str(run), *settings]
    assert not (tmp_path / "oops").exists()


def told_by(script: Path, folder: Path, *arguments: str, **environment: str) -> tuple[list[str], list[str]]:
    """What a job script calls `sorted-ds` and `srun` with."""
    programs = folder / "programs"
    programs.mkdir()
    for name in ("sorted-ds", "srun"):
        (programs / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{programs}/{name}.told"\n')
        (programs / name).chmod(0o755)
    env = {**os.environ, **environment, "PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(script), *arguments], check=True, cwd=folder, env=env)
    prepare, srun = ((programs / f"{name}.told").read_text().splitlines() for name in ("sorted-ds", "srun"))
    return prepare, srun


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ([], ["seed=3", "run_dir=runs/{name}-{seed}"]),
        (["run_dir=/my/place-{seed}"], ["seed=3"]),
        (["seed=7"], ["run_dir=runs/{name}-{seed}"]),
    ],
)
def test_an_array_says_what_the_user_does_not(tmp_path, given, added):
    script = ROOT / "launch" / "slurm.sbatch"
    prepare, _ = told_by(script, tmp_path, "my.toml", *given, SLURM_ARRAY_TASK_ID="3")
    assert prepare == ["prepare", "my.toml", *given, *added]


def test_prepare_takes_what_the_scripts_hand_on_to_it(run):
    assert main(["prepare", str(run), "--time-limit", "90", "--extend-space"]) == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--time", "soon"], r"error: --time = 'soon' should be like"),
        (["--sbatch=--array=0-3"], r"error: an array is several runs"),
        (["--sbatch=-p a100"], r"error: --sbatch '-p a100' should be a long option of sbatch"),
        ([r"run_dir=a\b"], r"error: '.*' cannot be written into a job script"),
        (["optim.name=adam"], r"error: .*optim.name = 'adam' should be"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(run, sbatch, capsys, arguments, told):
    assert main(["launch", "slurm", str(run), *arguments]) == 2
    assert re.search(told, capsys.readouterr().err)
    assert not run_dir(run).exists()


def test_the_job_does_not_inherit_that_this_machine_has_no_gpu(run, sbatch):
    (sbatch.parent / "bin" / "sbatch").write_text(f'#!/bin/sh\nenv > "{sbatch}"\necho 42\n')
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    script = "import sys; from sorted_ds.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", script, "launch", "slurm", str(run)], check=True, env=environment, cwd=ROOT)
    assert "DS_ACCELERATOR" not in sbatch.read_text()


def test_what_slurm_refuses_is_told(run, sbatch, capsys):
    (sbatch.parent / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    assert main(["launch", "slurm", str(run)]) == 2
    assert "sbatch refused the job: sbatch: error: invalid partition" in capsys.readouterr().err


def test_without_slurm_it_says_where_to_call_it(run, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", "slurm", str(run)]) == 2
    assert "Call this on a login node" in capsys.readouterr().err


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_each_script_is_shell_and_says_how_it_is_called(path):
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert f"launch/{path.name}" in path.read_text()
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 2, done.stderr
