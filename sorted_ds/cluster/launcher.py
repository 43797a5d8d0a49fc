"""Starts ranks on this machine through the real deepspeed launcher, and passes signals on to them.

In: a module and a number of ranks. Out: the launcher's exit code. The launcher runs in a session of its own, and
signals go to the ranks alone: the launcher itself would kill them after 30 s, in the middle of a checkpoint.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil
import torch

from sorted_ds.base.errors import UserError
from sorted_ds.cluster.ancestors import FIRST
from sorted_ds.cluster.stop import SIGNALLED

_said_of_this_machine: set[str] = set()
"""Variables that `settle_deepspeed` set: they do not hold for other machines."""
SIGNALS = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGINT: signal.SIGINT,
    signal.SIGHUP: signal.SIGINT,
}
"""And what ranks get for them (stop.py). A terminal that is closed sends SIGHUP twice."""
SECONDS_OF_ONE = 1.0
"""A terminal and a program between may both pass on one Ctrl-C."""


def num_devices() -> int:
    """GPUs that ranks will use: none where DeepSpeed was told to compute on the CPU."""
    return 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()


def settle_deepspeed() -> None:
    """Before it is imported: it uses the CPU where there is no GPU, and the ninja that was installed with it.

    Otherwise it warns on stdout; and found by turns, two ninjas have its operations compiled anew, half a minute each.
    """
    programs = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != programs:
        os.environ["PATH"] = os.pathsep.join(filter(None, [programs, os.environ.get("PATH")]))
    if not torch.cuda.is_available() and "DS_ACCELERATOR" not in os.environ:
        os.environ["DS_ACCELERATOR"] = "cpu"
        _said_of_this_machine.add("DS_ACCELERATOR")


def environment_for_others() -> dict[str, str]:
    """What a job on other machines inherits."""
    return {name: value for name, value in os.environ.items() if name not in _said_of_this_machine}


def launch(module: Sequence[str], num_ranks: int) -> int:
    """Runs `python -m module` on `num_ranks` ranks of this machine, and returns the launcher's exit code.

    Signals reach the ranks: they end the step, save and leave. A Ctrl-C after the first signal kills.
    """
    env, devices = launch_environment(num_ranks)
    env[FIRST] = str(os.getpid())
    flags = ["--no_local_rank", f"--master_port={free_port()}", "--log_level=critical", *devices]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *flags, "--module", *module]
    # A session of its own, or the terminal's Ctrl-C would reach the launcher, which kills.
    process = subprocess.Popen(command, env=env, start_new_session=True)
    first = float("inf")

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now, ranks = time.monotonic(), ranks_of(process.pid)
        if number == signal.SIGINT and now > first + SECONDS_OF_ONE:
            _send(tree_of(process.pid), signal.SIGKILL)
        elif ranks:
            _send(ranks, SIGNALS[signal.Signals(number)])
        else:
            _send(tree_of(process.pid), signal.SIGTERM)
        first = min(first, now)

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as under nohup
    before = {number: signal.signal(number, forward) for number in heard}
    try:
        code = process.wait()
        return code if code >= 0 else SIGNALLED - code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def launch_environment(num_ranks: int) -> tuple[dict[str, str], list[str]]:
    """Environment of the launcher, and its flags that choose the devices.

    Raises: UserError when there are fewer GPUs than ranks.
    """
    env = dict(os.environ)
    if not num_devices():
        env["DS_ACCELERATOR"] = "cpu"
        env.setdefault("OMP_NUM_THREADS", "1")
        env.pop("CUDA_VISIBLE_DEVICES", None)
        return env, [f"--num_accelerators={num_ranks}"]
    if num_ranks > num_devices():
        raise UserError(f"--ranks {num_ranks} needs as many GPUs, and this machine shows {num_devices()}.")
    # The launcher reads the devices from here only where no number is given, and otherwise takes the first ones.
    visible = env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_devices())))
    env["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:num_ranks])
    return env, []


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def tree_of(launcher: int) -> list[psutil.Process]:
    """The launcher's process and all below it."""
    try:
        top = psutil.Process(launcher)
        return [*top.children(recursive=True), top]
    except psutil.NoSuchProcess:
        return []


def ranks_of(launcher: int) -> list[psutil.Process]:
    """The ranks: children of the launcher's own child."""
    try:
        return [rank for starter in psutil.Process(launcher).children() for rank in starter.children()]
    except psutil.NoSuchProcess:
        return []


def _send(targets: Sequence[psutil.Process], number: int) -> None:
    for target in targets:
        with suppress(psutil.NoSuchProcess):
            target.send_signal(number)
