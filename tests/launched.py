"""Starts real runs, `sorted-ds train` or a launcher by itself, and reads what they leave."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import torch

from sorted_ds.checkpoint import read_master_weights
from sorted_ds.checkpoint.folders import checkpoint_name
from sorted_ds.cluster.launcher import free_port
from tests import forked

ROOT = Path(__file__).parent.parent
STEPS = 8
SAID = "said.txt"
"""Beside the run file of the run that tests share: what it said on stderr."""
SETTINGS = [f"train.steps={STEPS}", "checkpoint.every_steps=4", "checkpoint.keep_last=9", "log.every_steps=1"]
SETTINGS += ["eval.every_steps=3", "optim.learning_rate=0.01", "optim.eps=1e-6", "optim.warmup_steps=3"]


def command(run: Path, *settings: str, ranks: int = 2) -> list[str]:
    script = "import sys; from sorted_ds.commands.cli import main; sys.exit(main())"
    return [sys.executable, "-c", script, "train", str(run), *SETTINGS, *settings, "--ranks", str(ranks)]


def hears_all() -> None:
    """Lets a child hear every signal: one started in the background, or under nohup, would ignore some."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def train(run: Path, *settings: str, ranks: int = 2, code: int = 0) -> str:
    """What it says, to stdout and stderr. Without the deepspeed launcher, which takes most of a short run's time."""
    log = run.parent / "log.txt"
    found = forked.train([str(run), *SETTINGS, *settings, "--ranks", str(ranks)], log)
    assert found == code, log.read_text()
    return log.read_text()


def train_by_command(run: Path, *settings: str, code: int = 0, **kwargs) -> str:
    """What `sorted-ds train` says on stderr."""
    done = subprocess.run(
        command(run, *settings), cwd=ROOT, capture_output=True, text=True, check=False, timeout=300, **kwargs
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr


def run_dir(run: Path) -> Path:
    return run.parent / "runs" / run.stem


def masters(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return read_master_weights(run_dir(run) / "checkpoints" / checkpoint_name(step))


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir(run) / "metrics.jsonl").read_text().splitlines()]


def copied(whole: Path, folder: Path, keep_steps: int) -> Path:
    """The same run as if it had been interrupted after a checkpoint."""
    shutil.copytree(whole.parent, folder, dirs_exist_ok=True)
    run = folder / whole.name
    for path in (run_dir(run) / "checkpoints").iterdir():
        if path.name > f"step_{keep_steps:08d}":
            shutil.rmtree(path)
    shutil.rmtree(run_dir(run) / "model")
    return run


def one_error(said: str) -> str:
    assert "Traceback" not in said, said
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert len(errors) == 1, said
    return errors[0]


STAYING = """
import json, os, sys, time
from sorted_ds.space.sampling import Sampler
from sorted_ds.cluster.stop import listen
from sorted_ds.run.train import main
plan, seconds = Sampler.plan, json.loads(sys.argv.pop(1))[int(os.environ["RANK"])]
def stay_here(self, step):
    if step == 3 and sys._getframe(1).f_code.co_name == "train":  # the loop, and not the plan that is printed
        print("staying", file=sys.stderr, flush=True)
        time.sleep(seconds)
    return plan(self, step)
Sampler.plan = stay_here
listen()
sys.exit(main(sys.argv[1:]))
"""
"""A script of a rank that stays in its third step. First argument: for how many seconds each does, as JSON."""


LAUNCHERS = {
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "{port}"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "{port}"],
}


def by_launcher(name: str, script: str, *arguments: str, port: int = 0) -> subprocess.CompletedProcess:
    flags = [flag.format(port=port or free_port()) for flag in LAUNCHERS[name]]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *flags, script, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
