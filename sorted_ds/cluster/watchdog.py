"""Ends a rank that has made no progress for too long, after it has written the stacks of its threads.

In: a heartbeat whenever the rank has finished some work. On disk, after too long a silence:
RUN_DIR/stacks/rank_0003.txt with the stack of every thread (on stderr if the file cannot be written). Out: one line on
stderr and the end of the process; then the launcher ends all ranks.

When one rank hangs, all ranks wait for it, so all of them write their stacks: the rank whose stack differs from the
others is the one that hangs. A rank writes none while a call, for example to a file system that does not answer, keeps
Python's threads from running: then that rank is the one.
"""

import faulthandler
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

HANG_EXIT_CODE = 3
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_SUSPENDED = 10.0
"""A longer pause between two looks means that the whole process was suspended, as Slurm may do."""
SECONDS_TO_WRITE = 5.0
SECONDS_FOR_OTHERS = 10.0
"""Each rank counts from its own last heartbeat, so the others report a little later."""


class Watchdog:
    """A thread that runs inside of the `with` block and watches for heartbeats."""

    def __init__(self, minutes: float, run_dir: Path, rank: int):
        """`minutes`: the longest silence; with 0 the watchdog does nothing."""
        self._max_silent_seconds, self._rank = 60 * minutes, rank
        self._path = run_dir / "stacks" / f"rank_{rank:04d}.txt"
        self._is_over = threading.Event()
        self.heartbeat()

    def heartbeat(self) -> None:
        """Tells the watchdog that some work was finished."""
        self._last_heartbeat = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.heartbeat()
        if self._max_silent_seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()

    def _watch(self) -> None:
        last_look = time.monotonic()
        while not self._is_over.wait(min(SECONDS_BETWEEN_LOOKS, self._max_silent_seconds / 4)):
            now = time.monotonic()
            if now - last_look > SECONDS_SUSPENDED:
                self.heartbeat()
            last_look = now
            if now - self._last_heartbeat > self._max_silent_seconds:
                self._report_and_exit()

    def _report_and_exit(self) -> None:
        failures = [f"{self._path.parent} does not answer"]
        # In a thread of its own, because a file system that hangs may be what is wrong.
        writing = threading.Thread(target=self._write_stacks, args=(failures,), daemon=True)
        writing.start()
        writing.join(SECONDS_TO_WRITE)
        failure = "".join(failures)  # read once: the writing thread may still be at work
        stacks = f"The stacks of all threads are in {self._path}."
        if failure:
            stacks = f"The stacks of all threads follow, because they could not be written to a file ({failure})."
        with suppress(OSError):
            print(
                f"error (rank {self._rank}): no progress for {self._max_silent_seconds / 60:g} minutes "
                f"(train.hang_minutes). {stacks} Start the run again to resume from its last checkpoint.",
                file=sys.stderr,
                flush=True,
            )
            if failure:
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
        time.sleep(SECONDS_FOR_OTHERS)  # when the first rank exits, the launcher ends the others
        os._exit(HANG_EXIT_CODE)

    def _write_stacks(self, failures: list[str]) -> None:
        """Empties `failures`, or puts the error into it."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            failures.clear()
        except OSError as error:
            failures[:] = [str(error)]
