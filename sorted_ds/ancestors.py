"""Whether the processes that started a rank are still there.

In: the environment. Out: whether one of them has ended. A rank that nobody waits for any more would train on as an
orphan, and a run that is started again would meet it; so it stops, as for a signal (stop.py).
"""

import os
import time
from collections.abc import Mapping

import psutil

FIRST = "SORTED_DS_FIRST_PROCESS"
"""The number of `sorted-ds train`, which it sets for its ranks: those from it to the rank belong to the run."""
SECONDS_BETWEEN_LOOKS = 1.0


class Ancestors:
    """The rank's parent, and where `sorted-ds train` began it, all up to that."""

    def __init__(self, environment: Mapping[str, str], is_launched: bool):
        """`is_launched`: without a launcher the parent is a shell, which may leave."""
        parents = psutil.Process().parents() if is_launched else []
        numbers = [str(process.pid) for process in parents]
        first = environment.get(FIRST, "")
        self._watched = parents[: numbers.index(first) + 1 if first in numbers else 1]
        self._looked = 0.0

    def one_is_gone(self) -> bool:
        """Looks once a second at most."""
        now = time.monotonic()
        if now - self._looked < SECONDS_BETWEEN_LOOKS:
            return False
        self._looked = now
        if self._watched and os.getppid() != self._watched[0].pid:
            return True
        return not all(map(_is_alive, self._watched))


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
