"""Each real launcher on two hosts gives the weights of the same run on one machine, bit for bit."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sorted_ds.checkpoint.folders import published_checkpoints
from tests.cluster.machines import Cluster, wait_until
from tests.launched import ROOT, SETTINGS, copied, masters, one_error, run_dir

pytestmark = [pytest.mark.long, pytest.mark.ci]

PYTHON = sys.executable
SCRIPT = str(ROOT / "launch" / "train.py")
HOSTFILE = "h1 slots=1\nh2 slots=1\n"

DEEPSPEED = ["deepspeed", "--hostfile", "{hostfile}", "--master_port", "{port}"]
TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", "{node}"]
NO_SSH = [*DEEPSPEED, "--no_ssh", "--node_rank", "{node}", "--master_addr", "h1"]
SRUN = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
EXPORTED = ["DS_ACCELERATOR", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "PATH"]
AS_ROOT = ["--launcher_args=--allow-run-as-root"]
FLAGS = " ".join(["--allow-run-as-root", *(f"-x {name}" for name in EXPORTED)])
OPEN_MPI = ["env", f"MPIRUN_FLAGS={FLAGS}", "HOSTFILE={hostfile}", str(ROOT / "launch" / "mpi.sh"), "2"]

FROM_ONE_HOST = {
    "deepspeed over pdsh": [*DEEPSPEED, "--launcher", "pdsh", SCRIPT],
    "deepspeed --launcher openmpi": [*DEEPSPEED, "--launcher", "openmpi", *AS_ROOT, SCRIPT],
    "deepspeed --launcher mpich": [*DEEPSPEED, "--launcher", "mpich", SCRIPT],
    "deepspeed --launcher slurm": [*DEEPSPEED, "--launcher", "slurm", SCRIPT],
    "srun": [*SRUN, PYTHON, SCRIPT],
    "launch/mpi.sh": OPEN_MPI,
}
NODE_BY_NODE = {
    "deepspeed --no_ssh": [*NO_SSH, SCRIPT],
    "torchrun": [*TORCHRUN, "--master-addr", "h1", "--master-port", "{port}", SCRIPT],
}


@pytest.fixture
def run(whole, shared_folder) -> Path:
    """Returns a run file on the disk that the hosts share. Its data is prepared, and nothing is trained."""
    return copied(whole, shared_folder, keep_steps=0)


def filled(command: list[str], cluster: Cluster, run: Path, node: int = 0) -> list[str]:
    """Returns the command with its placeholders replaced and the run's arguments appended."""
    hostfile = cluster.folder / "hostfile"
    hostfile.write_text(HOSTFILE)
    port = 29500 + int(time.monotonic()) % 400
    return [part.format(hostfile=hostfile, port=port, node=node) for part in command] + [str(run), *SETTINGS]


def assert_same_weights(whole: Path, run: Path) -> None:
    before, after = masters(whole), masters(run)
    assert all(torch.equal(before[name], after[name]) for name in before)


def with_deepspeed_env(cluster: Cluster, run: Path) -> dict[str, str]:
    """Writes the variables that deepspeed passes on to ranks, and returns the variable that names the file."""
    lines = [f"{name}={cluster.environment[name]}" for name in EXPORTED]
    (run.parent / ".deepspeed_env").write_text("\n".join(lines))
    return {"DS_ENV_FILE": str(run.parent / ".deepspeed_env")}


def start(cluster: Cluster, run: Path, name: str) -> None:
    """Runs the whole run with one launcher. Raises: AssertionError when it fails."""
    if name in NODE_BY_NODE:
        starts = {host: filled(NODE_BY_NODE[name], cluster, run, node) for node, host in enumerate(cluster.hosts)}
    else:
        starts = {"h1": filled(FROM_ONE_HOST[name], cluster, run)}
    environment = with_deepspeed_env(cluster, run)
    if "mpich" in name:
        environment["PATH"] = f"{mpich_first(cluster)}:{cluster.environment['PATH']}"
    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(lambda item: cluster.on(item[0], *item[1], **environment), starts.items()))
    assert not any(done.returncode for done in ended), "\n".join(done.stdout + done.stderr for done in ended)


@pytest.mark.parametrize("name", [*FROM_ONE_HOST, *NODE_BY_NODE])
def test_a_launcher_gives_the_same_weights(cluster, whole, run, name):
    start(cluster, run, name)
    assert_same_weights(whole, run)


def test_ranks_save_and_exit_when_the_connections_of_pdsh_are_lost(cluster, run):
    """This happens when pdsh's host is lost. If pdsh alone is killed, its ssh stays, and the run continues."""
    command = filled(FROM_ONE_HOST["deepspeed over pdsh"], cluster, run)
    command += ["train.steps=2000", "checkpoint.every_steps=2000", "eval.every_steps=0"]
    environment, curves = with_deepspeed_env(cluster, run), run_dir(run) / "metrics.jsonl"
    curves.unlink()
    with ThreadPoolExecutor() as pool:
        ending = pool.submit(cluster.on, "h1", *command, **environment)
        wait_until(lambda: curves.exists() and '"step": 5,' in curves.read_text(), "step 5", 120)
        cluster.on("h1", "pkill", "-9", "-f", "^ssh -oConnectTimeout")
        wait_until(lambda: not ranks_on(cluster), "the end", 40)
        ending.result()
    (saved,) = published_checkpoints(run_dir(run) / "checkpoints")
    assert int(saved.name.removeprefix("step_")) >= 5


def ranks_on(cluster: Cluster) -> str:
    return "".join(cluster.on(host, "pgrep", "-f", "launch/train.py").stdout for host in cluster.hosts)


FAILING = """
import sys, time, types
from sorted_ds.commands import cli
from sorted_ds.cluster.rendezvous import _mpi_world
def main(arguments):
    if _mpi_world().rank == 1:
        raise ValueError("rank 1 cannot go on")
    time.sleep(100)
sys.modules["sorted_ds.run.train"] = types.SimpleNamespace(main=main)
cli.train_main()
"""


def test_a_rank_that_fails_under_mpirun_ends_the_others(cluster, run):
    """Python's usual exit would wait for the other ranks in MPI_Finalize."""
    (run.parent / "failing.py").write_text(FAILING)
    command = ["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    start = time.monotonic()
    done = cluster.on("h1", *command, PYTHON, str(run.parent / "failing.py"), str(run), PYTHONPATH=str(ROOT))
    assert time.monotonic() - start < 60
    assert done.returncode != 0
    assert "ValueError: rank 1 cannot go on" in done.stderr


def mpich_first(cluster: Cluster) -> Path:
    """Returns a folder in which `mpirun` is MPICH's, because Debian's `mpirun` is Open MPI's if both are installed.

    A link would not do: MPICH's program looks at its own name.
    """
    program = cluster.folder / "mpich" / "mpirun"
    program.parent.mkdir(exist_ok=True)
    program.write_text('#!/bin/sh\nexec mpirun.mpich "$@"\n')
    program.chmod(0o755)
    return program.parent


def test_a_wrong_setting_is_one_error_under_srun(cluster, run):
    done = cluster.on("h1", *SRUN, PYTHON, SCRIPT, str(run), "data.vocab_size=0")
    assert done.returncode != 0
    assert "vocab_size" in one_error(done.stderr)
