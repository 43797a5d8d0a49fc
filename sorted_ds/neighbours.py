"""Whether the other ranks are still there, asked of the kernel, whatever a collective makes of it.

In: the processes of all ranks. Out, when one has died and this rank is still there some seconds later: one line that
names it, and the end of the process. With gloo a collective raises and ranks.py names the lost; with NCCL it may wait
for ever, as between GPUs of one host, and a launcher may leave time to a rank that it has told to end. Each rank looks
at those of its own host and tells the others through the store.
"""

import json
import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch.distributed as dist

from sorted_ds.ancestors import is_alive

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_NOTICE = 10.0
"""So long a rank has to end by itself, by an error in a collective or its launcher."""
EXIT_CODE = 1
LOST, NAMED = "lost", "named"


def card() -> str:
    """Of this process, for the others."""
    return json.dumps([_machine(), os.getpid()])


def _machine() -> str:
    """Those with the same can see each other's processes: a kernel since its start, and a container on it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def names(lost: Sequence[int], num_ranks: int) -> str:
    """`rank 3 of 8 ended, or can no longer be reached`"""
    who = f"rank {lost[0]}" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))}"
    return f"{who} of {num_ranks} ended, or can no longer be reached"


class Neighbours:
    """A thread, from `with` to its end."""

    def __init__(self, cards: Sequence[str], rank: int, store: dist.Store):
        """`cards`: of all ranks, in their order."""
        self._rank, self._num_ranks, self._store = rank, len(cards), store
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="neighbours", daemon=True)
        self._gone: set[int] = set()
        self._watched: dict[int, psutil.Process] = {}
        for other, (machine, number) in enumerate(map(json.loads, cards)):
            if machine == _machine() and other != rank:
                try:
                    self._watched[other] = psutil.Process(number)
                except psutil.NoSuchProcess:
                    self._gone.add(other)

    def __enter__(self) -> "Neighbours":
        if self._num_ranks > 1:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(SECONDS_BETWEEN_LOOKS)

    def _watch(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_LOOKS):
            self._gone |= {other for other, process in self._watched.items() if not is_alive(process)}
            if lost := self._told(sorted(self._gone)):
                if not self._over.wait(SECONDS_TO_NOTICE):
                    self._leave(lost)
                return

    def _told(self, lost: list[int]) -> list[int]:
        """The lost, and on other hosts too. The store is rank 0's: when it does not answer, that is gone."""
        try:
            if lost:
                self._store.set(LOST, json.dumps(lost))
            return json.loads(self._store.get(LOST)) if self._store.check([LOST]) else []
        except (RuntimeError, OSError):
            return lost or [0]

    def _leave(self, lost: list[int]) -> None:
        try:
            is_speaker = self._store.add(NAMED, 1) == 1
        except (RuntimeError, OSError):
            is_speaker = self._rank < min(self._watched.keys() - lost, default=self._num_ranks)
        if is_speaker:
            message = f"{names(lost, self._num_ranks)}. Start the run again to go on from its last checkpoint."
            print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)
