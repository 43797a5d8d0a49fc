"""Starts ranks on this machine through the real deepspeed launcher, and forwards signals to them.

In: a module and a number of ranks. Out: the launcher's exit code. The launcher runs in a session of its own, and
signals go to the ranks alone: a signal to the launcher would make it kill the ranks after 30 s, perhaps in the middle
of a checkpoint.
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
from sorted_ds.cluster.ancestors import FIRST_PID_VARIABLE
from sorted_ds.cluster.stop import SIGNAL_EXIT_CODE

_set_for_this_machine: set[str] = set()
"""Variables that `configure_environment` set. Other machines may need other values."""
FORWARDED_SIGNALS = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGINT: signal.SIGINT,
    signal.SIGHUP: signal.SIGINT,
}
"""The signals that `launch` forwards, and the signal that ranks get for each (stop.py).

A terminal that is closed sends SIGHUP twice, so a second SIGHUP, unlike a second SIGINT, does not kill.
"""
SECONDS_OF_ONE_INTERRUPT = 1.0
"""A terminal and a program in between may both forward one Ctrl-C."""


def num_devices() -> int:
    """Returns the number of GPUs that ranks will use: 0 if DS_ACCELERATOR tells DeepSpeed to use the CPU."""
    return 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()


def configure_environment() -> None:
    """Sets what DeepSpeed reads when it is imported: the CPU where there is no GPU, and the ninja of this environment.

    Without DS_ACCELERATOR, DeepSpeed warns on stdout. If runs find different versions of ninja in turn, DeepSpeed
    compiles its operations again each time, which takes half a minute for each.
    """
    programs = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != programs:
        os.environ["PATH"] = os.pathsep.join(filter(None, [programs, os.environ.get("PATH")]))
    if not torch.cuda.is_available() and "DS_ACCELERATOR" not in os.environ:
        os.environ["DS_ACCELERATOR"] = "cpu"
        _set_for_this_machine.add("DS_ACCELERATOR")


def environment_of_jobs() -> dict[str, str]:
    """Returns the environment for a job on other machines, without the values that hold for this machine alone."""
    return {name: value for name, value in os.environ.items() if name not in _set_for_this_machine}


def launch(module: Sequence[str], num_ranks: int) -> int:
    """Runs `python -m module` on `num_ranks` ranks of this machine and returns the launcher's exit code.

    After a signal the ranks finish their step, save and exit. A Ctrl-C after the first signal kills all of them.
    """
    env, devices = launch_environment(num_ranks)
    env[FIRST_PID_VARIABLE] = str(os.getpid())
    flags = ["--no_local_rank", f"--master_port={free_port()}", "--log_level=critical", *devices]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *flags, "--module", *module]
    # Without a session of its own the launcher would get the terminal's Ctrl-C, and kill the ranks.
    process = subprocess.Popen(command, env=env, start_new_session=True)
    first_signal_time = float("inf")

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal first_signal_time
        now, ranks = time.monotonic(), rank_processes(process.pid)
        if number == signal.SIGINT and now > first_signal_time + SECONDS_OF_ONE_INTERRUPT:
            _send(process_tree(process.pid), signal.SIGKILL)
        elif ranks:
            _send(ranks, FORWARDED_SIGNALS[signal.Signals(number)])
        else:
            _send(process_tree(process.pid), signal.SIGTERM)
        first_signal_time = min(first_signal_time, now)

    # A signal that is ignored already, as SIGHUP is under nohup, stays ignored.
    numbers = [number for number in FORWARDED_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    handlers_before = {number: signal.signal(number, forward) for number in numbers}
    try:
        code = process.wait()
        return code if code >= 0 else SIGNAL_EXIT_CODE - code
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)


def launch_environment(num_ranks: int) -> tuple[dict[str, str], list[str]]:
    """Returns the launcher's environment and its flags that choose the devices.

    Raises: UserError when there are fewer GPUs than ranks.
    """
    env = dict(os.environ)
    if not num_devices():
        env["DS_ACCELERATOR"] = "cpu"
        env.setdefault("OMP_NUM_THREADS", "1")
        env.pop("CUDA_VISIBLE_DEVICES", None)
        return env, [f"--num_accelerators={num_ranks}"]
    if num_ranks > num_devices():
        raise UserError(
            f"--ranks {num_ranks} is a GPU for each rank, but this machine shows {num_devices()} GPUs. Set --ranks to "
            f"{num_devices()} or less, or start the job on more machines (docs/cluster.md)."
        )
    # With a flag for the number of GPUs the launcher would ignore CUDA_VISIBLE_DEVICES and take the first ones.
    visible = env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_devices())))
    env["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:num_ranks])
    return env, []


def free_port() -> int:
    """Returns a TCP port of this machine that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def process_tree(launcher_pid: int) -> list[psutil.Process]:
    """Returns the launcher's process and all of its descendants; empty when the launcher has ended."""
    try:
        launcher = psutil.Process(launcher_pid)
        return [*launcher.children(recursive=True), launcher]
    except psutil.NoSuchProcess:
        return []


def rank_processes(launcher_pid: int) -> list[psutil.Process]:
    """Returns the ranks, which are children of the launcher's own child; empty when the launcher has ended."""
    try:
        return [rank for starter in psutil.Process(launcher_pid).children() for rank in starter.children()]
    except psutil.NoSuchProcess:
        return []


def _send(targets: Sequence[psutil.Process], number: int) -> None:
    for target in targets:
        with suppress(psutil.NoSuchProcess):
            target.send_signal(number)
