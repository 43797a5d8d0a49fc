"""A cluster on one machine: hosts with their own network, processes, /tmp and sshd, and a Slurm whose nodes they are.

A host is a set of namespaces on a bridge; the rest of the disk is shared, as a home directory on NFS is, and /tmp too
where this project lies in it. Slurm's controller runs outside, one slurmd inside each host. Needs root and the packages
that tests/cluster/install.sh names.
`python -m tests.cluster.machines FOLDER COMMAND ...` runs a command on the first host of a cluster of two.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = (
    "slurmctld",
    "slurmd",
    "munged",
    "sshd",
    "pdsh",
    "mpirun.openmpi",
    "mpirun.mpich",
    "ip",
    "nsenter",
    "scontrol",
)
NETWORK, BRIDGE = "10.77.0", "sdsbr"
PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
VENV = Path(sys.executable).parent
SECONDS_TO_START = 20


def missing() -> list[str]:
    """What is not installed here."""
    search = os.pathsep.join((os.environ["PATH"], *PATH))
    return [name for name in PROGRAMS if not shutil.which(name, path=search)] + ["root"] * (os.geteuid() != 0)


def forbidden() -> str:
    """What this machine lets nobody do, installed or not; empty where hosts can be made."""
    unshare = ["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--mount-proc", "true"]
    bridge = ["ip", "link", "add", f"{BRIDGE}-try", "type", "bridge"]
    told = [subprocess.run(command, capture_output=True, text=True, check=False) for command in (unshare, bridge)]
    subprocess.run(["ip", "link", "del", f"{BRIDGE}-try"], capture_output=True, check=False)
    return " ".join(done.stderr.strip() for done in told if done.returncode)


SSHD = """\
HostKey {folder}/{host}/key
PidFile none
AuthorizedKeysFile {folder}/ssh/id_ed25519.pub
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
StrictModes no
MaxStartups 100
SetEnv PATH={path}
"""
START = """\
set -e
hostname {host}
for place in {own}; do mount -t tmpfs tmpfs $place; chmod 1777 $place; done
{cgroups}
mkdir -p /run/sshd /root/.ssh
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh /root/.ssh
exec /usr/sbin/sshd -D -e -f {folder}/{host}/sshd_config
"""
FREEZER = "/sys/fs/cgroup/freezer"
CGROUPS = f"""\
mount -t tmpfs tmpfs /sys/fs/cgroup
mkdir {FREEZER}
mount -t cgroup -o freezer none {FREEZER}
mkdir -p {FREEZER}/{{host}}
mount --bind {FREEZER}/{{host}} {FREEZER}
"""
"""By which Slurm knows the processes of a task, as on most clusters: it signals the first alone. One for each host."""
SSH = """\
Host *
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
SLURM = """\
ClusterName=tests
SlurmctldHost={controller}({network}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n/spool
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000,batch_sched_delay=1
KillWait=10
SlurmdTimeout=15
InactiveLimit=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30 OverSubscribe=NO
PartitionName=at_once Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=0 OverSubscribe=NO
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF OverSubscribe=NO
"""


class Cluster:
    """Hosts h1, h2, ...; from `with` to its end."""

    def __init__(self, folder: Path, num_hosts: int = 2):
        """`folder`: where everything of the cluster is kept."""
        self.folder = folder
        self.has_cgroups = "\nfreezer" in Path("/proc/cgroups").read_text()
        self.hosts = {f"h{number + 1}": f"{NETWORK}.{number + 1}" for number in range(num_hosts)}
        self.environment = {
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "PATH": os.pathsep.join((str(VENV), *PATH)),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(Path.cwd() / ".cache/torch_extensions")),
        }

    def __enter__(self) -> "Cluster":
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._write_files()
        self._start_hosts()
        self._start_slurm()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def command(self, host: str, *command: str, **environment: str) -> list[str]:
        """What runs `command` on a host, as a fresh login would."""
        names = {**self.environment, **environment}
        enter = ["nsenter", "--target", (self.folder / host / "pid").read_text(), "-n", "-u", "-m", "-p", "-i"]
        return [*enter, "env", "-i", *(f"{name}={value}" for name, value in names.items()), *command]

    def on(self, host: str, *command: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
        """Its result, with both streams as text."""
        full = self.command(host, *command, **environment)
        return subprocess.run(full, capture_output=True, text=True, check=False, timeout=timeout)

    def said(self, host: str, *command: str) -> str:
        """The output of a command that must work."""
        done = self.on(host, *command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def _write_files(self) -> None:
        for name in ("ssh", "munge", "state", *(f"{host}/spool" for host in self.hosts)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        values = {"folder": self.folder, "network": NETWORK, "path": self.environment["PATH"]}
        shared = self.folder.is_relative_to("/tmp") or VENV.is_relative_to("/tmp")
        values["own"] = " ".join(("/dev/shm", "/run", *([] if shared else ["/tmp"])))
        values["controller"] = socket.gethostname().split(".")[0]
        values["tracking"] = "cgroup" if self.has_cgroups else "linuxproc"
        lines = [f"{address} {host}" for host, address in self.hosts.items()]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        (self.folder / "ssh" / "config").write_text(SSH)
        _key(self.folder / "ssh" / "id_ed25519")
        for host in self.hosts:
            (self.folder / host / "sshd_config").write_text(SSHD.format(host=host, **values))
            cgroups = CGROUPS.format(host=host) if self.has_cgroups else ""
            (self.folder / host / "start.sh").write_text(START.format(host=host, cgroups=cgroups, **values))
            _key(self.folder / host / "key")
        nodes = [f"NodeName={h} NodeAddr={a} CPUs=2 RealMemory=4000 State=UNKNOWN" for h, a in self.hosts.items()]
        (self.folder / "slurm.conf").write_text(SLURM.format(nodes="\n".join(nodes), **values))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "munge" / "key").write_bytes(os.urandom(1024))
        (self.folder / "munge" / "key").chmod(0o400)
        (self.folder / "munge").chmod(0o755)

    def _start_hosts(self) -> None:
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "addr", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        for host, address in self.hosts.items():
            namespace, outer = f"sds-{host}", f"sdsv-{host}"
            _run("ip", "netns", "add", namespace)
            _run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _run("ip", "link", "set", outer, "master", BRIDGE, "up")
            _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _run("ip", "-n", namespace, "link", "set", device, "up")
            unshare = ["unshare", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
            start = ["ip", "netns", "exec", namespace, *unshare, "bash", str(self.folder / host / "start.sh")]
            with (self.folder / host / "sshd.log").open("w") as log:
                streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                process = subprocess.Popen(start, **streams, start_new_session=True)
            until(lambda process=process: _child(process.pid), f"{host} did not start")
            (self.folder / host / "pid").write_text(str(_child(process.pid)))
        for host in self.hosts:
            until(lambda host=host: self.on(host, "ssh", host, "true").returncode == 0, f"no ssh to {host}")

    def _start_slurm(self) -> None:
        munge = self.folder / "munge"
        files = [f"--{name}={munge / name.split('-')[0]}" for name in ("key-file", "socket", "log-file", "seed-file")]
        _run("munged", "--force", f"--pid-file={self.folder / 'munged.pid'}", *files)
        environment = {**os.environ, "SLURM_CONF": self.environment["SLURM_CONF"]}
        _run("slurmctld", "-f", self.environment["SLURM_CONF"], env=environment)
        for host in self.hosts:
            self.said(host, "slurmd", "-f", self.environment["SLURM_CONF"], "-N", host)
        idle = ("sinfo", "--noheader", "--partition", "main", "--states", "idle", "--format", "%D")
        first = next(iter(self.hosts))
        until(lambda: self.on(first, *idle).stdout.strip() == str(len(self.hosts)), "Slurm did not start")

    def close(self) -> None:
        """Ends everything, also what an earlier test run left."""
        for pid in (*(self.folder / host / "pid" for host in self.hosts), *self.folder.glob("*.pid")):
            if pid.is_file():
                _kill(int(pid.read_text()))
                pid.unlink()
        for host in self.hosts:
            inside = subprocess.run(["ip", "netns", "pids", f"sds-{host}"], capture_output=True, text=True, check=False)
            for pid in inside.stdout.split():
                _kill(int(pid))
            subprocess.run(["ip", "netns", "del", f"sds-{host}"], capture_output=True, check=False)
            subprocess.run(["ip", "link", "del", f"sdsv-{host}"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


def _run(*command: str, **more) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"


def _key(path: Path) -> None:
    if not path.exists():
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))


def _child(pid: int) -> int:
    """The first process of a host: the child of unshare, which ip has become."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    text = found.read_text().split() if found.exists() else []
    return int(text[0]) if text else 0


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def until(is_so: Callable[[], bool], complaint: str, seconds: float = SECONDS_TO_START) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, complaint
        time.sleep(0.1)


if __name__ == "__main__":
    with Cluster(Path(sys.argv[1]).absolute()) as cluster:
        done = cluster.on("h1", *sys.argv[2:])
        print(done.stdout, done.stderr, sep="")
