"""Injects faults into a run: kills, stops, full disks, damaged files, a killed slurmd, a cut network.

In: the processes of a run, its checkpoints, or its cluster, and a random source. Out: a text that says what exactly was
done; "" if there was nothing to injure.
"""

import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path

import psutil

from sorted_ds.checkpoint.index import INDEX
from tests.cluster.machines import Cluster
from tests.cluster.test_slurm import preempt

LAUNCHERS = {
    "sorted-ds": "sorted_ds.commands.cli",
    "deepspeed": "deepspeed.launcher.runner",
    "launch": "deepspeed.launcher.launch",
}


def processes(run: Path) -> list[psutil.Process]:
    """Returns every living process that has the run file in its command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        if str(run) in command and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
            found.append(process)
    return found


def ranks(run: Path) -> dict[int, psutil.Process]:
    """Returns the processes of the run's ranks, by the rank's number."""
    found = {}
    for process in processes(run):
        if "sorted_ds.commands.rank" in process.cmdline() and "deepspeed.launcher" not in " ".join(process.cmdline()):
            found[int(process.environ()["RANK"])] = process
    return found


def _hit(victims: Collection[psutil.Process], injure: Callable[[psutil.Process], object], victim_names: str) -> str:
    """Injures the processes and returns their names; "" if no process was left."""
    for victim in victims:
        injure(victim)
    return victim_names if victims else ""


def _hit_a_rank(run: Path, chance: random.Random, injure: Callable[[psutil.Process], object]) -> str:
    rank, victim = chance.choice(sorted(ranks(run).items()) or [(-1, None)])
    return _hit([victim] if victim else [], injure, f"rank {rank}")


def kill_a_rank(run: Path, chance: random.Random) -> str:
    return _hit_a_rank(run, chance, psutil.Process.kill)


def stop_a_rank(run: Path, chance: random.Random) -> str:
    return _hit_a_rank(run, chance, psutil.Process.suspend)


def kill_all_ranks(run: Path, chance: random.Random) -> str:
    return _hit(ranks(run).values(), psutil.Process.kill, "all ranks")


def kill_everything(run: Path, chance: random.Random) -> str:
    """Kills every process, as a power failure would, except that the kernel still writes what it has cached."""
    return _hit(processes(run), psutil.Process.kill, "all processes")


def kill_a_launcher(run: Path, chance: random.Random) -> str:
    """Kills `sorted-ds train` itself, deepspeed's launcher, or the process that the launcher starts on each host."""
    name = chance.choice(list(LAUNCHERS))
    for process in processes(run):
        if any(LAUNCHERS[name] in part for part in process.cmdline()):
            process.kill()
            return name
    return ""


def fill_the_disk(run: Path, chance: random.Random) -> str:
    """Limits the size of files that one rank may write: for some seconds, or in half of the cases until its end."""
    is_permanent, seconds = chance.random() < 0.5, chance.uniform(0.5, 3)

    def limit(victim: psutil.Process) -> None:
        resource.prlimit(victim.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        if is_permanent:
            return
        time.sleep(seconds)
        if victim.is_running():
            resource.prlimit(victim.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    hit = _hit_a_rank(run, chance, limit)
    return hit and f"{hit}, {'until its end' if is_permanent else 'for a while'}"


KILLS: dict[str, Callable[[Path, random.Random], str]] = {
    "kill -9 of a rank": kill_a_rank,
    "kill -9 of all ranks": kill_all_ranks,
    "kill -9 of a launcher": kill_a_launcher,
    "kill -9 of everything": kill_everything,
    "SIGSTOP of a rank": stop_a_rank,
    "a full disk (RLIMIT_FSIZE)": fill_the_disk,
}
"""Faults of a run that is training."""


def _a_shard(checkpoint: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(checkpoint.glob("rank_*.safetensors")))


def _a_file(checkpoint: Path, chance: random.Random) -> Path:
    return chance.choice([_a_shard(checkpoint, chance), checkpoint / INDEX])


def truncate(checkpoint: Path, chance: random.Random) -> str:
    path = _a_shard(checkpoint, chance)
    size = chance.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"{path.name} to {size} bytes"


def flip_a_bit(checkpoint: Path, chance: random.Random) -> str:
    path = _a_file(checkpoint, chance)
    content = bytearray(path.read_bytes())
    bit = chance.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"bit {bit} of {path.name}"


def lose_a_file(checkpoint: Path, chance: random.Random) -> str:
    path = _a_file(checkpoint, chance)
    path.unlink()
    return path.name


DAMAGES: dict[str, Callable[[Path, random.Random], str]] = {
    "a truncated shard": truncate,
    "a flipped bit": flip_a_bit,
    "a missing file": lose_a_file,
}
"""Faults of the newest checkpoint, between two starts."""


def kill_slurmd(cluster: Cluster, chance: random.Random) -> str:
    """Kills a slurmd and starts it again, soon or after Slurm has given the node up."""
    host, seconds = chance.choice(sorted(cluster.hosts)), chance.choice([2, 25])
    cluster.on(host, "pkill", "-9", "-x", "slurmd")
    time.sleep(seconds)
    cluster.output(host, "slurmd", "-f", cluster.environment["SLURM_CONF"], "-N", host)
    return f"on {host}, for {seconds} s"


def cut_the_network(cluster: Cluster, chance: random.Random) -> str:
    """Disconnects one host from all others for some seconds."""
    host, seconds = chance.choice(sorted(cluster.hosts)), chance.choice([3, 40])
    for state in ("down", "up"):
        subprocess.run(["ip", "link", "set", f"sdsv-{host}", state], check=True)
        if state == "down":
            time.sleep(seconds)
    return f"{host}, for {seconds} s"


def kill_ranks_of_a_host(cluster: Cluster, chance: random.Random) -> str:
    host = chance.choice(sorted(cluster.hosts))
    killed = cluster.on(host, "pkill", "-9", "-f", "sorted_ds.commands.rank").returncode == 0
    return f"on {host}" if killed else ""


def preempt_the_job(cluster: Cluster, chance: random.Random) -> str:
    """Submits a job with a higher priority, for which Slurm preempts the run's job with a GraceTime of 30 s."""
    preempt(cluster)
    return "by a job of 2 s"


CLUSTER: dict[str, Callable[[Cluster, random.Random], str]] = {
    "kill -9 of slurmd": kill_slurmd,
    "a cut network": cut_the_network,
    "kill -9 of a host's ranks, in Slurm": kill_ranks_of_a_host,
    "preemption": preempt_the_job,
}


def fresh(original: Path, folder: Path) -> Path:
    """Copies a run with its prepared data but nothing trained, and returns the copy's run file."""
    shutil.copytree(original.parent, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "runs", ignore_errors=True)
    return folder / original.name
