"""Creates a cluster on one machine: hosts with their own network, processes, /tmp and sshd, as the nodes of a Slurm.

A host is a set of namespaces on a bridge. All hosts share the rest of the disk, as they would share a home directory on
NFS; they share /tmp too if this project lies in it. Slurm's controller runs outside, and one slurmd inside each host.
Needs root and the packages that tests/cluster/install.sh installs.
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


def missing_programs() -> list[str]:
    """Returns what a cluster needs and this machine lacks: names of programs, and "root"."""
    search = os.pathsep.join((os.environ["PATH"], *PATH))
    return [name for name in PROGRAMS if not shutil.which(name, path=search)] + ["root"] * (os.geteuid() != 0)


def refusal_of_hosts() -> str:
    """Returns the error by which this machine refuses to create hosts, as some containers do; "" if it does not."""
    unshare = ["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--mount-proc", "true"]
    bridge = ["ip", "link", "add", f"{BRIDGE}-try", "type", "bridge"]
    tried = [subprocess.run(command, capture_output=True, text=True, check=False) for command in (unshare, bridge)]
    subprocess.run(["ip", "link", "del", f"{BRIDGE}-try"], capture_output=True, check=False)
    return " ".join(done.stderr.strip() for done in tried if done.returncode)


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
for path in {own_folders}; do mount -t tmpfs tmpfs $path; chmod 1777 $path; done
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
"""With a freezer for each host, Slurm tracks tasks as on most clusters: it signals their first process alone."""
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
    """Hosts h1, h2, ... and a Slurm on them, which run inside of the `with` block."""

    def __init__(self, folder: Path, num_hosts: int = 2):
        """`folder`: holds the files of the cluster; its contents are deleted at the start."""
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
        """Returns the command line that runs `command` on a host, with the environment of a fresh login."""
        variables = {**self.environment, **environment}
        enter = ["nsenter", "--target", (self.folder / host / "pid").read_text(), "-n", "-u", "-m", "-p", "-i"]
        return [*enter, "env", "-i", *(f"{name}={value}" for name, value in variables.items()), *command]

    def on(self, host: str, *command: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
        """Runs a command on a host and returns its result, with both streams as text."""
        full = self.command(host, *command, **environment)
        return subprocess.run(full, capture_output=True, text=True, check=False, timeout=timeout)

    def output(self, host: str, *command: str) -> str:
        """Returns the output of a command that must succeed."""
        done = self.on(host, *command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def _write_files(self) -> None:
        for name in ("ssh", "munge", "state", *(f"{host}/spool" for host in self.hosts)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        values = {"folder": self.folder, "network": NETWORK, "path": self.environment["PATH"]}
        shared = self.folder.is_relative_to("/tmp") or VENV.is_relative_to("/tmp")
        values["own_folders"] = " ".join(("/dev/shm", "/run", *([] if shared else ["/tmp"])))
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
            wait_until(lambda process=process: _child(process.pid), f"{host} did not start")
            (self.folder / host / "pid").write_text(str(_child(process.pid)))
        for host in self.hosts:
            wait_until(lambda host=host: self.on(host, "ssh", host, "true").returncode == 0, f"no ssh to {host}")

    def _start_slurm(self) -> None:
        munge = self.folder / "munge"
        files = [f"--{name}={munge / name.split('-')[0]}" for name in ("key-file", "socket", "log-file", "seed-file")]
        _run("munged", "--force", f"--pid-file={self.folder / 'munged.pid'}", *files)
        environment = {**os.environ, "SLURM_CONF": self.environment["SLURM_CONF"]}
        _run("slurmctld", "-f", self.environment["SLURM_CONF"], env=environment)
        for host in self.hosts:
            self.output(host, "slurmd", "-f", self.environment["SLURM_CONF"], "-N", host)
        idle = ("sinfo", "--noheader", "--partition", "main", "--states", "idle", "--format", "%D")
        first = next(iter(self.hosts))
        wait_until(lambda: self.on(first, *idle).stdout.strip() == str(len(self.hosts)), "Slurm did not start")

    def close(self) -> None:
        """Ends all hosts and daemons, and those that an earlier test run left."""
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
    """Returns the first process of a host, which is the child of unshare; 0 before it exists."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    text = found.read_text().split() if found.exists() else []
    return int(text[0]) if text else 0


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def wait_until(condition: Callable[[], bool], failure: str, seconds: float = SECONDS_TO_START) -> None:
    """Returns when the condition is true. Raises: AssertionError with the text `failure` after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, failure
        time.sleep(0.1)


if __name__ == "__main__":
    with Cluster(Path(sys.argv[1]).absolute()) as cluster:
        done = cluster.on("h1", *sys.argv[2:])
        print(done.stdout, done.stderr, sep="")
