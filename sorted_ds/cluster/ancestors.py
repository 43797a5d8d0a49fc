"""Detects that a process that started this rank has ended.

In: the environment, and the processes of this host. Out: whether an ancestor of this rank has ended. Such a rank would
train on as an orphan, and the next start of the run would collide with it. So it stops, as after a signal (stop.py).
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, takewhile
from pathlib import Path

import psutil

FIRST_PID_VARIABLE = "SORTED_DS_FIRST_PROCESS"
"""`sorted-ds train` sets it to its process number: the processes from that one down to the rank belong to the run."""
SECONDS_BETWEEN_LOOKS = 1.0
SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "fish", "csh", "tcsh")
"""A shell may end before the processes that it started: after `nohup ... &`, and at a logout."""


class Ancestors:
    """The processes that started this rank, shells left out.

    With `sorted-ds train` these are all processes up to it. With another launcher they are the rank's parent, the
    deepspeed launcher above the parent, and the end of pdsh's connection.
    """

    def __init__(self, environment: Mapping[str, str], parent_pid: int, is_launched: bool):
        """`parent_pid`: the parent when the rank started. `is_launched`: without a launcher nothing is watched."""
        self._last_look = 0.0
        first_pid = environment.get(FIRST_PID_VARIABLE, "")
        self._watched: list[psutil.Process] = []
        self._has_one_ended = (is_launched or bool(first_pid)) and os.getppid() != parent_pid
        """True from the beginning when the parent was killed while this rank started."""
        if first_pid:
            self._watched = list(_ancestors_up_to(int(first_pid)))
            self._has_one_ended |= not self._watched or self._watched[-1].pid != int(first_pid)
        elif is_launched and not self._has_one_ended:
            ancestors = list(_ancestors_up_to(0))  # empty for the first process of a container
            self._watched = [process for process in ancestors[:1] if not _is_shell(process)]
            self._watched += takewhile(_is_deepspeed_launcher, ancestors[1:])
            self._watched += _pdsh_connection(ancestors)

    def has_one_ended(self) -> bool:
        """Returns whether a watched process has ended. Looks at the processes once a second at most."""
        now = time.monotonic()
        if self._has_one_ended or now - self._last_look < SECONDS_BETWEEN_LOOKS:
            return self._has_one_ended
        self._last_look = now
        self._has_one_ended = not all(map(is_alive, self._watched))
        return self._has_one_ended


def _ancestors_up_to(pid: int) -> Iterator[psutil.Process]:
    """Yields the parent, the parent's parent and so on, to the process with this number."""
    process = _parent_of(psutil.Process())
    while process is not None:
        yield process
        process = _parent_of(process) if process.pid != pid else None


def _parent_of(process: psutil.Process) -> psutil.Process | None:
    """Returns None also if this user may not look at the parent."""
    try:
        return process.parent()
    except psutil.Error:
        return None


def _pdsh_connection(ancestors: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Returns the sshd process by which pdsh started deepspeed on this host, in a list; empty without pdsh.

    A user who calls `deepspeed` in an ssh session has another process in between, and may log out.
    """
    above = [process for process in ancestors[1:] if not _is_shell(process)]
    has_pdsh = bool(above) and _is_deepspeed_launcher(ancestors[0]) and _name(above[0]).startswith("sshd")
    return above[:1] if has_pdsh else []


def _is_shell(process: psutil.Process) -> bool:
    return _name(process) in SHELLS


def _name(process: psutil.Process) -> str:
    """Returns "" if this user may not look at the process."""
    try:
        return process.name()
    except psutil.Error:
        return ""


def _is_deepspeed_launcher(process: psutil.Process) -> bool:
    """Whether this is the command `deepspeed`, or the process that it starts on each host to start the ranks."""
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    is_module = any(flag == "-m" and name.startswith("deepspeed.launcher") for flag, name in pairwise(command))
    return is_module or any(Path(part).name == "deepspeed" for part in command[:2])


def is_alive(process: psutil.Process) -> bool:
    """Whether the process still runs. A process that this user may not look at counts as alive."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except psutil.NoSuchProcess:
        return False
