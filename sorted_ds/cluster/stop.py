"""Decides whether a run must stop before its last step: after a signal, for a touched file, or at a deadline.

In: signals, files in RUN_DIR, the clock. Out: this rank's `StopRequest`, asked for once a step and before each
sub-network of an evaluation. The ranks sum their requests, so the request of one rank stops all (train.py).
This module imports nothing slow, because `listen` runs before the slow imports: until then a signal kills the process.

| cause | stops the run | requeues its Slurm job |
|---|---|---|
| SIGTERM (preemption) | yes | yes |
| SIGUSR1 (`#SBATCH --signal`, `scancel -s USR1`) | yes | yes, if a step was done |
| SIGINT (Ctrl-C) | yes | no |
| RUN_DIR/requeue is touched | yes | yes |
| RUN_DIR/stop is touched | yes | no |
| the next step would go beyond `train.time_limit` | yes | yes, if a step was done |
| a process that started the ranks has ended (ancestors.py) | yes | no |
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

REQUEUE_SIGNALS, FINAL_SIGNALS = (signal.SIGTERM, signal.SIGUSR1), (signal.SIGINT,)
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""These end a process that waits for other ranks. SIGUSR1 does not: it only announces a later end."""
STOP_FILE, REQUEUE_FILE = "stop", "requeue"
SIGNAL_EXIT_CODE = 128
"""The exit code of a process that a signal ended is this plus the signal's number, as in a shell."""
SECONDS_TO_EXIT = 5.0
"""How long a process takes from the last save to its end."""

START_TIME, PARENT_PID = time.monotonic(), os.getppid()
_received_signals: set[int] = set()


def listen() -> None:
    """Records signals from now on, instead of dying from them."""
    for number in (*REQUEUE_SIGNALS, *FINAL_SIGNALS):
        signal.signal(number, lambda number, frame: _received_signals.add(number))


@contextmanager
def leaving_on_signals(leave: Callable[[int], NoReturn]) -> Iterator[None]:
    """Calls `leave(number)` at once for SIGTERM and SIGINT, inside of the block and for earlier ones.

    This is for the time when ranks wait for each other: there is nothing to save yet, and a rank that died never comes.
    A thread does it, because Python's own handlers do not run while the main thread waits inside of torch.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def watch() -> None:
        while number := receiver.recv(1):
            if number[0] in ENDING_SIGNALS:
                leave(number[0])

    descriptor_before = signal.set_wakeup_fd(sender.fileno())
    for number in _received_signals & set(ENDING_SIGNALS):
        leave(number)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor_before)
        sender.close()
        thread.join()
        receiver.close()


class StopRequest(NamedTuple):
    """Says whether the run must stop now. The fields are numbers, so that requests of several ranks can be summed."""

    stops: float = 0
    """More than 0: the run stops now."""
    asks_requeue: float = 0
    """More than 0: a cause asks to requeue the Slurm job."""
    forbids_requeue: float = 0
    """More than 0: a cause forbids to requeue the job, which counts more."""

    @property
    def requeues(self) -> bool:
        return bool(self.asks_requeue and not self.forbids_requeue)


class StopCauses:
    """Everything that can stop a run. Rank 0 alone looks at the files and the clock."""

    def __init__(self, run_dir: Path, time_limit: str, is_first: bool, is_orphan: Callable[[], bool] = bool):
        """`is_orphan`: returns whether a process that started this rank has ended.

        Raises: UserError for a time limit that cannot be read.
        """
        self._is_orphan = is_orphan
        self._files = {name: run_dir / name for name in (STOP_FILE, REQUEUE_FILE)} if is_first else {}
        self._limit_seconds = time_limit_seconds(time_limit) if is_first and time_limit else float("inf")
        self._seen_files: set[str] = set()
        self._last_check = 0.0
        self._longest_interval = 0.0
        self.reason = ""
        """The causes of this rank's last request, as a text for the user."""

    def skip_interval(self) -> None:
        """Leaves the time since the last request out of the forecast: the work of that time will not come again."""
        self._last_check = 0.0

    def request(self, seconds_to_save: float | None) -> StopRequest:
        """Returns this rank's request as of now. `seconds_to_save`: the time of a save; None before the first one."""
        now = time.monotonic()
        if self._last_check:
            self._longest_interval = max(self._longest_interval, now - self._last_check)
        self._last_check = now
        # os.path.exists returns False, where pathlib raises, when a network file system fails for a moment.
        touched = [name for name, path in self._files.items() if os.path.exists(path)]
        self._seen_files.update(touched)
        # The longest interval between two requests covers a step with the wait for a save, or the evaluation of a
        # sub-network. Before the first save, a save is expected to take no longer than that.
        seconds_to_save = self._longest_interval if seconds_to_save is None else seconds_to_save
        next_end = now - START_TIME + self._longest_interval + seconds_to_save + SECONDS_TO_EXIT
        is_deadline = next_end > self._limit_seconds
        causes = [signal.Signals(number).name for number in sorted(_received_signals)]
        causes += [f"the file {name}" for name in touched] + ["the time limit"] * is_deadline
        causes += ["the process that started it is gone"] * self._is_orphan()
        self.reason = ", ".join(causes)
        # A job whose time is too short for one step would be requeued again and again.
        is_out_of_time = (is_deadline or signal.SIGUSR1 in _received_signals) and self._longest_interval > 0
        asks_requeue = signal.SIGTERM in _received_signals or REQUEUE_FILE in touched or is_out_of_time
        forbids_requeue = bool(_received_signals & set(FINAL_SIGNALS)) or STOP_FILE in touched
        return StopRequest(bool(causes), asks_requeue, forbids_requeue)

    def acknowledge(self, is_finished: bool = False) -> None:
        """Deletes the stop files that this start has acted on.

        A file that was touched later stays, for the next start to act on, unless the run `is_finished`.
        """
        for name, path in self._files.items():
            if is_finished or name in self._seen_files:
                with suppress(OSError):
                    path.unlink()


def time_limit_seconds(text: str, name: str = "train.time_limit") -> float:
    """Returns the seconds of a time limit in Slurm's notation.

    The notation is minutes[:seconds], hours:minutes:seconds or days-hours[:minutes[:seconds]]. `name`: the setting that
    the error names. Raises: UserError for any other text. Source: sbatch(1), `--time`.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not found:
        raise UserError(f"{name} = {text!r} should be like 90 (minutes), 90:00, 1:30:00 or 1-12:00:00 (days-hours...).")
    days, *numbers = found.groups()
    values = [int(number) for number in numbers if number is not None]
    units = ((60,), (60, 1), (3600, 60, 1))[len(values) - 1] if days is None else (3600, 60, 1)
    return 86_400 * int(days or 0) + float(sum(value * unit for value, unit in zip(values, units, strict=False)))
