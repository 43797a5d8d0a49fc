"""A rank that hears nothing of its run for too long says where it stands, and leaves.

In: a beat whenever something was finished. Out, after a silence: RUN_DIR/stacks/rank_0003.txt with the stack of every
thread (stderr, where that cannot be), one line on stderr, and the end of the process, which the launcher makes the end
of all. When one rank hangs, all wait for it, so all write: the stacks that differ from the others name the one. A rank
in a call that lets no thread of Python run, as one that waits for a file system can, writes none: it is that one.
"""

import faulthandler
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

EXIT_CODE = 3
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_ASLEEP = 10.0
SECONDS_TO_WRITE = 5.0
SECONDS_FOR_OTHERS = 10.0
"""Ranks bark one after the other: each from its own last beat."""


class Watchdog:
    """A thread, from `with` to its end."""

    def __init__(self, minutes: float, run_dir: Path, rank: int):
        """Never barks where `minutes` is 0."""
        self._seconds, self._rank = 60 * minutes, rank
        self._path = run_dir / "stacks" / f"rank_{rank:04d}.txt"
        self._over = threading.Event()
        self.beat()

    def beat(self) -> None:
        """Something was finished."""
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.beat()
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(min(SECONDS_BETWEEN_LOOKS, self._seconds / 4)):
            now = time.monotonic()
            if now - looked > SECONDS_ASLEEP:  # the whole process was suspended, as Slurm can
                self.beat()
            looked = now
            if now - self._last > self._seconds:
                self._bark()

    def _bark(self) -> None:
        where = [f"nowhere: {self._path.parent} does not answer"]
        writing = threading.Thread(target=self._write_stacks, args=(where,), daemon=True)
        writing.start()
        writing.join(SECONDS_TO_WRITE)
        with suppress(OSError):
            print(
                f"error (rank {self._rank}): nothing was finished for {self._seconds / 60:g} minutes "
                f"(train.hang_minutes). Stacks are in {where[0]}. Start the run again to go on from its last "
                "checkpoint.",
                file=sys.stderr,
                flush=True,
            )
            if where[0] != str(self._path):
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
        time.sleep(SECONDS_FOR_OTHERS)  # the first to leave has the launcher end the others
        os._exit(EXIT_CODE)

    def _write_stacks(self, where: list[str]) -> None:
        """In a thread of its own: a file system that hangs may be what is wrong."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            where[0] = str(self._path)
        except OSError as error:
            where[0] = f"nowhere ({error})"
