"""When a run ends before its last step: a signal, a touched file, or a deadline.

In: signals, files in RUN_DIR, the clock. Out, once a step and before each sub-network of an evaluation: whether
this rank wants the run to end, and whether it is to go on later, as a requeued Slurm job. Ranks add up what they want,
so one is enough (train.py). Imports nothing slow: `listen` is called first of all, or a signal in the seconds of the
imports would kill.

| what | ends | goes on in a Slurm job |
|---|---|---|
| SIGTERM (preemption) | yes | yes |
| SIGUSR1 (`#SBATCH --signal`, `scancel -s USR1`) | yes | yes, if a step was done |
| SIGINT (Ctrl-C) | yes | no |
| RUN_DIR/requeue is touched | yes | yes |
| RUN_DIR/stop is touched | yes | no |
| `train.time_limit` would pass in the next step | yes | yes, if a step was done |
| a process that started the ranks is gone (ancestors.py) | yes | no |
"""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from sorted_ds.base.errors import UserError

LATER, FOR_GOOD = (signal.SIGTERM, signal.SIGUSR1), (signal.SIGINT,)
ENDING = (signal.SIGTERM, signal.SIGINT)
"""SIGUSR1 tells of an end that comes later."""
STOP_FILE, REQUEUE_FILE = "stop", "requeue"
SIGNALLED = 128
"""The shell's exit code of a process that a signal ended is this and the signal's number."""
SECONDS_TO_LEAVE = 5.0
"""From the last save to the end of the process."""

STARTED, PARENT = time.monotonic(), os.getppid()
_signals: set[int] = set()


def listen() -> None:
    """Remembers signals from now on."""
    for number in (*LATER, *FOR_GOOD):
        signal.signal(number, lambda number, frame: _signals.add(number))


@contextmanager
def nothing_to_save(leave: Callable[[int], NoReturn]) -> Iterator[None]:
    """While ranks wait for each other, and one that died never comes, each of these signals calls `leave` with its
    number, also one that came before. In a thread: to wait is a call that does not come back to Python's handlers.
    """
    heard, tell = socket.socketpair()
    tell.setblocking(False)

    def watch() -> None:
        while number := heard.recv(1):
            if number[0] in ENDING:
                leave(number[0])

    before = signal.set_wakeup_fd(tell.fileno())
    for number in _signals & set(ENDING):
        leave(number)
    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        tell.close()
        watching.join()
        heard.close()


class Wanted(NamedTuple):
    """Of one rank, or added up over all."""

    ends: float = 0
    """Whether the run shall end now."""
    later: float = 0
    """Whether it shall go on later."""
    for_good: float = 0
    """Whether it shall not, which is stronger."""

    @property
    def goes_on(self) -> bool:
        return bool(self.later and not self.for_good)


class Stop:
    """Asked again and again. Files and the clock are looked at by rank 0 alone."""

    def __init__(self, run_dir: Path, time_limit: str, is_first: bool, is_orphan: Callable[[], bool] = bool):
        """`is_orphan`: whether nobody waits for this rank any more. Raises: UserError for a time limit that is none."""
        self._is_orphan = is_orphan
        self._files = {name: run_dir / name for name in (STOP_FILE, REQUEUE_FILE)} if is_first else {}
        self._seconds = seconds_of(time_limit) if is_first and time_limit else float("inf")
        self._seen: set[str] = set()
        self._asked = 0.0
        self._longest = 0.0
        self.reason = ""
        """Of this rank, for the last word."""

    def pass_over(self) -> None:
        """What was done since the last question does not come again."""
        self._asked = 0.0

    def wanted(self, seconds_to_save: float | None) -> Wanted:
        """Now. `seconds_to_save`: how long a save took, None where there was none yet."""
        now = time.monotonic()
        if self._asked:
            self._longest = max(self._longest, now - self._asked)
        self._asked = now
        touched = [name for name, path in self._files.items() if os.path.exists(path)]
        # os.path: pathlib raises where a file system has a bad moment.
        self._seen.update(touched)
        # The longest time from question to question so far holds a step and the wait for a save, or the evaluation of
        # a sub-network. Before the first save a save is taken to be no longer than that.
        seconds_to_save = self._longest if seconds_to_save is None else seconds_to_save
        is_due = now - STARTED + self._longest + seconds_to_save + SECONDS_TO_LEAVE > self._seconds
        names = [signal.Signals(number).name for number in sorted(_signals)]
        names += [f"the file {name}" for name in touched] + ["the time limit"] * is_due
        names += ["the process that started it is gone"] * self._is_orphan()
        self.reason = ", ".join(names)
        # A job whose time is too short for one step would be started again for ever.
        is_late = (is_due or signal.SIGUSR1 in _signals) and self._longest > 0
        later = signal.SIGTERM in _signals or REQUEUE_FILE in touched or is_late
        return Wanted(bool(names), later, bool(_signals & set(FOR_GOOD)) or STOP_FILE in touched)

    def heeded(self, is_through: bool = False) -> None:
        """The files that were seen have had their effect: the next start must not see them. One that was touched since
        then is for the next start, where the run `is_through` for none.
        """
        for name, path in self._files.items():
            if is_through or name in self._seen:
                with suppress(OSError):
                    path.unlink()


def seconds_of(text: str, name: str = "train.time_limit") -> float:
    """Of a time limit as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds, or `days-` before hours.

    Raises: UserError for anything else. Source: sbatch(1), `--time`.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not found:
        raise UserError(f"{name} = {text!r} should be like 90 (minutes), 90:00, 1:30:00 or 1-12:00:00 (days-hours...).")
    days, *numbers = found.groups()
    values = [int(number) for number in numbers if number is not None]
    units = ((60,), (60, 1), (3600, 60, 1))[len(values) - 1] if days is None else (3600, 60, 1)
    return 86_400 * int(days or 0) + float(sum(value * unit for value, unit in zip(values, units, strict=False)))
