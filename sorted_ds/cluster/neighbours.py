"""Finds out which ranks have died, names them on stderr, and ends this rank if it does not end by itself.

In: the process numbers of all ranks, and a store that all ranks share. Each rank asks the kernel of its host about the
ranks there and writes the dead ones into the store. Out: the dead ranks, for a rank whose collective failed (ranks.py).
A rank that still runs some seconds after a death prints one line on stderr and ends. None of this depends on
collectives, because with NCCL they may wait without end, for example between GPUs of one host, and a launcher may let
the other ranks run on for a while.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil
from torch.distributed import PrefixStore, Store

from sorted_ds.cluster.ancestors import is_alive

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_ANSWER = 5.0
"""How long the living ranks wait for each other before they name the ranks that did not answer."""
SECONDS_TO_END = 10.0
"""How long a rank may take to end by itself, by an error in a collective or by its launcher, before it is ended."""
LOST_RANK_EXIT_CODE = 1
MAX_EXTRA_CONNECTIONS = 400
"""With more ranks, second connections to the store would need over 1,024 open files on the store's host."""
LOST, REPORTED, ANSWERED, DONE = "lost", "reported", "answered", "done"
"""Keys in the store. The last two are followed by a rank's number."""

T = TypeVar("T")


def describe_process() -> str:
    """Returns this process's machine and number as JSON, by which ranks of the same machine can watch it."""
    return json.dumps([_machine(), os.getpid()])


def _machine() -> str:
    """Returns the same text for processes that can see each other: one boot of a kernel, one container on it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def describe_lost(lost: Sequence[int], num_ranks: int) -> str:
    """Returns a text like "rank 3 of 8 ended or cannot be reached"."""
    who = f"rank {lost[0]}" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))}"
    return f"{who} of {num_ranks} ended or cannot be reached"


class Neighbours:
    """The other ranks of a run. A thread watches them from `watch` to the end of the `with` block."""

    def __init__(self, rank: int, num_ranks: int, store: Store, rank_0_keeps_store: bool):
        """`rank_0_keeps_store`: whether the store is lost when rank 0 ends."""
        self._rank, self._ranks = rank, range(num_ranks)
        # On a shared connection a look would wait as long as the rank itself waits for a key.
        can_clone = cast(Any, store)  # torch's stubs lack it
        self._store = can_clone.clone() if 1 < num_ranks <= MAX_EXTRA_CONNECTIONS else store
        self._rank_0_keeps_store, self._is_store_lost, self._has_reported = rank_0_keeps_store, False, False
        self._is_over = threading.Event()
        self._lost: list[int] = []
        self._first_loss_time = 0.0
        self._dead_before_watch: set[int] = set()
        """Ranks of this host that ended before `watch` was called."""
        self._watched: dict[int, psutil.Process] = {}

    def watch(self, processes: Sequence[str]) -> None:
        """Starts to watch. `processes`: the `describe_process` of every rank, in the order of ranks."""
        # torchrun keeps its store when it starts the ranks again; the prefix separates the starts.
        self._store = PrefixStore(processes[0], self._store)
        for other, (machine, pid) in enumerate(map(json.loads, processes)):
            if machine == _machine() and other != self._rank:
                try:
                    self._watched[other] = psutil.Process(pid)
                except psutil.NoSuchProcess:
                    self._dead_before_watch.add(other)
        if len(self._ranks) > 1:
            threading.Thread(target=self._watch, name="neighbours", daemon=True).start()

    def __enter__(self) -> "Neighbours":
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()

    def lost(self) -> list[int]:
        """Returns the ranks that were dead one second after the first death was seen.

        Later deaths are consequences of the first.
        """
        if not self._lost or time.monotonic() < self._first_loss_time + SECONDS_BETWEEN_LOOKS:
            if dead := self._dead_here():
                self._ask(lambda store: store.append(LOST, "".join(f"{other} " for other in dead)))
            reported: list[bytes] = self._ask(lambda store: store.get(LOST).split() if store.check([LOST]) else [], [])
            with_store = {0} if self._is_store_lost and self._rank_0_keeps_store else set()
            if not self._lost:
                self._first_loss_time = time.monotonic()
            self._lost = sorted(({*dead, *map(int, reported)} | with_store) - {self._rank})
        return self._lost

    def missing(self) -> list[int]:
        """Returns the lost ranks; if no kernel has seen a death, the ranks that do not answer.

        For a rank whose collective has failed: every living rank comes here, and answers by that.
        """
        self._ask(lambda store: store.set(f"{ANSWERED}_{self._rank}", ""))
        end, silent = time.monotonic() + SECONDS_TO_ANSWER, list(self._ranks)
        while silent and not self.lost() and time.monotonic() < end:
            time.sleep(0.1)
            silent = [other for other in silent if not self._ask(self._has(ANSWERED, other), otherwise=True)]
        return self.lost() or silent

    def report(self, message: str) -> None:
        """Prints the message on one rank of the run, and returns when the other ranks have had time to see the loss.

        If the store was lost with rank 0, one rank of each host prints it.
        """
        is_repeated, self._has_reported = self._has_reported, True  # both the thread and the rank itself come here
        is_lowest_here = self._rank < min(self._watched.keys() - self.lost(), default=len(self._ranks))
        if not is_repeated and self._ask(lambda store: store.add(REPORTED, 1) == 1, otherwise=is_lowest_here):
            with suppress(OSError):  # a log on a full disk must not keep this rank alive
                print(
                    f"error: {message}. Start the run again to resume from its last checkpoint.",
                    file=sys.stderr,
                    flush=True,
                )
        self._ask(lambda store: store.set(f"{DONE}_{self._rank}", ""))
        # Meanwhile every rank sees the lost ones, before it could see this one end.
        time.sleep(2 * SECONDS_BETWEEN_LOOKS)
        if self._rank == 0:
            self._wait_for_others()

    def _wait_for_others(self) -> None:
        """Keeps the store alive for the others: it ends with rank 0, or with torchrun after its last rank."""
        end = time.monotonic() + SECONDS_TO_END
        others = set(self._ranks) - {self._rank, *self.lost()}
        while others and time.monotonic() < end:
            time.sleep(0.1)
            others = {other for other in others if not self._ask(self._has(DONE, other), otherwise=True)}
            others -= self._dead_here()

    def _dead_here(self) -> set[int]:
        """Returns the dead ranks of this host, as its kernel knows them."""
        return self._dead_before_watch | {other for other, process in self._watched.items() if not is_alive(process)}

    def _has(self, key: str, other: int) -> Callable[[Any], bool]:
        return lambda store: store.check([f"{key}_{other}"])

    def _ask(self, question: Callable[[Any], T], otherwise: T | None = None) -> T:
        """Returns the store's answer, or `otherwise` if the store does not answer.

        A store that failed once is not asked again, because torch logs each failure at length.
        """
        if not self._is_store_lost:
            try:
                return question(self._store)
            except (RuntimeError, OSError):
                self._is_store_lost = True
        return cast(T, otherwise)

    def _watch(self) -> None:
        while not self._is_over.wait(SECONDS_BETWEEN_LOOKS):
            if self.lost() and not self._is_over.wait(SECONDS_TO_END):
                try:
                    self.report(describe_lost(self.lost(), len(self._ranks)))
                finally:
                    os._exit(LOST_RANK_EXIT_CODE)
