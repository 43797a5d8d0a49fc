"""Which ranks are gone: asked of the kernel on each host, told through the store, whatever a collective makes of it.

In: the processes of all ranks, and a store. Out: who is lost, to a rank whose collective broke (ranks.py); and where
a rank has died and this one is still there some seconds later, one line and the end of the process. With NCCL a
collective may wait for ever, as between GPUs of one host, and a launcher may leave time to ranks that it told to end.
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
"""How long those that are left wait for each other, before they name those that are not."""
SECONDS_TO_NOTICE = 10.0
"""So long a rank has to end by itself, by an error in a collective or its launcher."""
EXIT_CODE = 1
MOST_CLIENTS = 400
"""With more ranks the store's host would keep over 1,024 files open, if each had a second connection to it."""
LOST, TOLD, HERE, DONE = "lost", "told", "here", "done"
"""Keys of the store; the last two of each rank."""

T = TypeVar("T")


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
    """A thread, from `watch` to the end of `with`."""

    def __init__(self, rank: int, num_ranks: int, store: Store, is_rank_0s: bool):
        """`is_rank_0s`: whether the store is gone when rank 0 is."""
        self._rank, self._ranks = rank, range(num_ranks)
        # A connection of its own: on a shared one a look waits as long as the rank itself waits for a key.
        can_clone = cast(Any, store)  # torch's stubs lack it
        self._store = can_clone.clone() if 1 < num_ranks <= MOST_CLIENTS else store
        self._is_rank_0s, self._is_silent, self._has_told = is_rank_0s, False, False
        self._over = threading.Event()
        self._lost: list[int] = []
        self._seen = 0.0
        self._unwatched: set[int] = set()
        """Of this host, dead before they could be watched."""
        self._watched: dict[int, psutil.Process] = {}

    def watch(self, cards: Sequence[str]) -> None:
        """From now on. `cards`: of all ranks, in their order."""
        self._store = PrefixStore(cards[0], self._store)  # torchrun keeps its store when it starts the ranks again
        for other, (machine, number) in enumerate(map(json.loads, cards)):
            if machine == _machine() and other != self._rank:
                try:
                    self._watched[other] = psutil.Process(number)
                except psutil.NoSuchProcess:
                    self._unwatched.add(other)
        if len(self._ranks) > 1:
            threading.Thread(target=self._watch, name="neighbours", daemon=True).start()

    def __enter__(self) -> "Neighbours":
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def lost(self) -> list[int]:
        """As far as a kernel had told one look after it first told of any: whoever is left ends soon, too."""
        if not self._lost or time.monotonic() < self._seen + SECONDS_BETWEEN_LOOKS:
            if dead := self._dead():
                self._ask(lambda store: store.append(LOST, "".join(f"{other} " for other in dead)))
            told: list[bytes] = self._ask(lambda store: store.get(LOST).split() if store.check([LOST]) else [], [])
            silent = {0} if self._is_silent and self._is_rank_0s else set()
            if not self._lost:
                self._seen = time.monotonic()
            self._lost = sorted(({*dead, *map(int, told)} | silent) - {self._rank})
        return self._lost

    def missing(self) -> list[int]:
        """The lost; or where no kernel has told of any, those that do not answer. For when a collective broke."""
        self._ask(lambda store: store.set(f"{HERE}_{self._rank}", ""))
        end, silent = time.monotonic() + SECONDS_TO_ANSWER, list(self._ranks)
        while silent and not self.lost() and time.monotonic() < end:
            time.sleep(0.1)
            silent = [other for other in silent if not self._ask(self._has(HERE, other), otherwise=True)]
        return self.lost() or silent

    def tell(self, what: str) -> None:
        """Says it, on one rank: of all, or where the store went with rank 0, of a host. Returns when others know it."""
        is_twice, self._has_told = self._has_told, True  # the thread, while the rank itself is about it
        is_lowest = self._rank < min(self._watched.keys() - self.lost(), default=len(self._ranks))
        if not is_twice and self._ask(lambda store: store.add(TOLD, 1) == 1, otherwise=is_lowest):
            told = f"error: {what}. Start the run again to go on from its last checkpoint."
            with suppress(OSError):  # a log on a full disk must not keep this rank
                print(told, file=sys.stderr, flush=True)
        self._ask(lambda store: store.set(f"{DONE}_{self._rank}", ""))
        time.sleep(2 * SECONDS_BETWEEN_LOOKS)  # until then their kernel has told them of the lost, and not of this one
        if self._rank == 0:
            self._wait_for_others()

    def _wait_for_others(self) -> None:
        """They ask the store, which ends with this rank, or with torchrun, which ends with the last of its ranks."""
        end = time.monotonic() + SECONDS_TO_NOTICE
        others = set(self._ranks) - {self._rank, *self.lost()}
        while others and time.monotonic() < end:
            time.sleep(0.1)
            others = {other for other in others if not self._ask(self._has(DONE, other), otherwise=True)}
            others -= self._dead()

    def _dead(self) -> set[int]:
        """Those of this host, by its kernel."""
        return self._unwatched | {other for other, process in self._watched.items() if not is_alive(process)}

    def _has(self, what: str, other: int) -> Callable[[Any], bool]:
        return lambda store: store.check([f"{what}_{other}"])

    def _ask(self, question: Callable[[Any], T], otherwise: T | None = None) -> T:
        """`otherwise` when the store is silent. It is not asked again: torch tells of each failure at length."""
        if not self._is_silent:
            try:
                return question(self._store)
            except (RuntimeError, OSError):
                self._is_silent = True
        return cast(T, otherwise)

    def _watch(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_LOOKS):
            if self.lost() and not self._over.wait(SECONDS_TO_NOTICE):
                try:
                    self.tell(names(self.lost(), len(self._ranks)))
                finally:
                    os._exit(EXIT_CODE)
