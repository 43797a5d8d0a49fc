"""Whether the processes that started a rank are still there.

In: the environment. Out: whether one of them has ended. A rank that nobody waits for any more would train on as an
orphan, and a run that is started again would meet it; so it stops, as for a signal (stop.py).
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, takewhile
from pathlib import Path

import psutil

FIRST = "SORTED_DS_FIRST_PROCESS"
"""The number of `sorted-ds train`, which it sets for its ranks: those from it to the rank belong to the run."""
SECONDS_BETWEEN_LOOKS = 1.0
SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "fish", "csh", "tcsh")
"""They may leave before what they started: `nohup ... &`, and a logout."""


class Ancestors:
    """The rank's parent, the deepspeed launcher above it and pdsh's connection, or all up to `sorted-ds train`.

    Shells do not count.
    """

    def __init__(self, environment: Mapping[str, str], parent: int, is_launched: bool):
        """`parent`: its number when the rank started. `is_launched`: without a launcher nobody is watched."""
        self._looked = 0.0
        first = environment.get(FIRST, "")
        self._watched: list[psutil.Process] = []
        self._is_gone = (is_launched or bool(first)) and os.getppid() != parent
        """Already: it was killed while this rank started."""
        if first:
            self._watched = list(_up_to(int(first)))
            self._is_gone |= not self._watched or self._watched[-1].pid != int(first)
        elif is_launched and not self._is_gone:
            above = list(_up_to(0))  # none that can be seen, for the first process of a container
            self._watched = [process for process in above[:1] if not _is_shell(process)]
            self._watched += takewhile(_is_deepspeed, above[1:])
            self._watched += _connection(above)

    def one_is_gone(self) -> bool:
        """Looks once a second at most."""
        now = time.monotonic()
        if self._is_gone or now - self._looked < SECONDS_BETWEEN_LOOKS:
            return self._is_gone
        self._looked = now
        self._is_gone = not all(map(is_alive, self._watched))
        return self._is_gone


def _up_to(number: int) -> Iterator[psutil.Process]:
    """The processes above this one, to that of the number."""
    process = _parent_of(psutil.Process())
    while process is not None:
        yield process
        process = _parent_of(process) if process.pid != number else None


def _parent_of(process: psutil.Process) -> psutil.Process | None:
    """None where it may not be looked at."""
    try:
        return process.parent()
    except psutil.Error:
        return None


def _connection(above: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Of pdsh, which starts deepspeed's process of each host over ssh: its end is sshd's. Whoever calls `deepspeed` in
    a login has its process between, and may log out.
    """
    others = [process for process in above[1:] if not _is_shell(process)]
    is_started = bool(others) and _is_deepspeed(above[0]) and _name(others[0]).startswith("sshd")
    return others[:1] if is_started else []


def _is_shell(process: psutil.Process) -> bool:
    return _name(process) in SHELLS


def _name(process: psutil.Process) -> str:
    """Empty where it may not be looked at."""
    try:
        return process.name()
    except psutil.Error:
        return ""


def _is_deepspeed(process: psutil.Process) -> bool:
    """Its command `deepspeed`, which starts a process on each host (deepspeed/launcher), which starts the ranks."""
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    is_module = any(flag == "-m" and name.startswith("deepspeed.launcher") for flag, name in pairwise(command))
    return is_module or any(Path(part).name == "deepspeed" for part in command[:2])


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except psutil.NoSuchProcess:
        return False
