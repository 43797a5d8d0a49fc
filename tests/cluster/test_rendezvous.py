"""The rank is read from the variables that each launcher really sets; contradictions are one clear error."""

import subprocess
import sys
from unittest import mock

import pytest

from sorted_ds.base.errors import UserError
from sorted_ds.cluster import rendezvous
from sorted_ds.cluster.rendezvous import RankInfo, find_rank_info

ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SRUN = {
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "node1",
    "SLURM_JOB_ID": "1200",
    "SLURM_STEP_ID": "0",
}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
BATCH_SHELL = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1200"}


def test_the_variables_of_each_launcher_are_read():
    assert find_rank_info({**TORCHRUN, **ADDRESS}) == RankInfo("deepspeed or torchrun", 3, 4, 1, "node1", 29500)
    assert find_rank_info(SRUN) == RankInfo("Slurm", 1, 2, 0, "node1", 20_000 + (1200 * 17) % 10_000)
    for names, launcher in ((OPEN_MPI, "Open MPI"), (MPICH, "MPICH")):
        with mock.patch.object(rendezvous, "_check_mpi_world"):
            assert find_rank_info({**names, **ADDRESS}) == RankInfo(launcher, 1, 2, 1, "node1", 29500)


def test_the_inner_launcher_and_the_users_address_come_first():
    assert find_rank_info({**SRUN, **TORCHRUN, **ADDRESS}).launcher == "deepspeed or torchrun"
    assert find_rank_info({**SRUN, **ALONE, "CROSS_SIZE": "1"}).size == 1, "`sorted-ds train --ranks 1` in each task"
    assert find_rank_info({**SRUN, **ADDRESS}) == RankInfo("Slurm", 1, 2, 0, "node1", 29500)


def test_a_process_that_no_launcher_started_is_the_only_rank():
    assert find_rank_info({}) == RankInfo("", 0, 1, 0)
    assert find_rank_info(BATCH_SHELL) == RankInfo("", 0, 1, 0), "the shell of a batch job is no rank"


def test_each_job_step_gets_its_own_port():
    ports = {find_rank_info({**SRUN, "SLURM_JOB_ID": str(job)}).port for job in range(1200, 1300)}
    assert len(ports) == 100
    assert all(20_000 <= port < 30_000 for port in ports)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"PMI_RANK": "3", "PMI_SIZE": "16"},
            r"PMI_RANK and PMI_SIZE are set, but MPI_LOCALRANKID not: .* export RANK, WORLD_SIZE and LOCAL_RANK",
        ),
        ({"RANK": "0"}, r"RANK is set, but WORLD_SIZE and LOCAL_RANK not: a launcher sets all three"),
        ({**TORCHRUN}, r"MASTER_ADDR and MASTER_PORT do not say where rank 0 listens"),
        ({**TORCHRUN, **ADDRESS, "RANK": "4"}, r"RANK = 4, WORLD_SIZE = 4, LOCAL_RANK = 1 is impossible"),
        ({**TORCHRUN, **ADDRESS, "RANK": "one"}, r"RANK = 'one', .* should be whole numbers"),
        ({**TORCHRUN, **ADDRESS, "MASTER_PORT": "99999"}, r"MASTER_PORT = 99999 is not a port"),
        (
            {**SRUN, **ALONE},
            r"WORLD_SIZE = 1, but SLURM_PROCID = 1 and SLURM_STEP_NUM_TASKS = 2: Slurm started 2 .* Unset RANK, WORLD",
        ),
        (
            {**SRUN, "SLURM_STEP_NODELIST": "node[1-"},
            r"the first host of SLURM_STEP_NODELIST = 'node\[1-' is unknown",
        ),
    ],
)
def test_contradictions_are_reported_with_their_values(variables, message):
    with pytest.raises(UserError, match=message):
        find_rank_info(variables)


def test_mpirun_without_mpi4py_is_an_error_that_says_what_to_install():
    with mock.patch.dict(sys.modules, {"mpi4py": None}), pytest.raises(UserError, match=r"sorted-ds\[mpi\]"):
        find_rank_info(OPEN_MPI)


def test_the_mpirun_of_another_mpi_is_an_error_and_not_two_runs_of_one_rank():
    script = (
        "import os; os.environ.update(PMI_RANK='1', PMI_SIZE='2', MPI_LOCALRANKID='1')\n"
        "from sorted_ds.cluster.rendezvous import find_rank_info\n"
        "class World: rank, size = 0, 1\n"
        "import sorted_ds.cluster.rendezvous as r; r._mpi_world = World\n"
        "find_rank_info(os.environ)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "mpirun of MPICH started 2 processes, but mpi4py sees 1" in done.stderr
