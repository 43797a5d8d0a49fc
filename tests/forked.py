"""`sorted-ds train`, and scripts of ranks, without their imports: forked from a process that has them.

All of the command runs but the deepspeed launcher: text is prepared, ranks meet over TCP, one's end is another's error.
Tests of signals, of launchers, and of what a process inherits start the command itself (launched.py).
"""

import os
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from sorted_ds.cluster.launcher import free_port
from tests.spawn import ROOT, context_of, enter, leave

SECONDS = 300


def train(arguments: Sequence[str], log: Path) -> int:
    """`sorted-ds train` with these arguments: its exit code. What it says is in `log`."""
    process = context_of("cpu").Process(target=_command, args=(list(arguments), dict(os.environ), log))
    process.start()
    return end_of([process], [log])[0]


def start_ranks(script: Path, arguments: Sequence[str], num_ranks: int) -> tuple[list[BaseProcess], list[Path]]:
    """A rank each that runs the script, as if no launcher had started it, and the log of each."""
    logs = [script.with_suffix(f".{rank}.log") for rank in range(num_ranks)]
    environment, context = {**os.environ, **_meeting_point()}, context_of("cpu")
    ranks = []
    for rank, log in enumerate(logs):
        log.touch()  # one may look before the rank has opened it
        places = {**environment, **_place(rank, num_ranks)}
        ranks.append(context.Process(target=_script, args=(script, list(arguments), places, log)))
        ranks[-1].start()
    return ranks, logs


def by_ranks(script: Path, *arguments: str, num_ranks: int = 2) -> tuple[list[int], str]:
    """Exit codes, and what all said."""
    ranks, logs = start_ranks(script, arguments, num_ranks)
    return end_of(ranks, logs), "".join(log.read_text() for log in logs)


def end_of(processes: Sequence[BaseProcess], logs: Sequence[Path], seconds: float = SECONDS) -> list[int]:
    """Their exit codes. Raises: AssertionError, with what they said, where one takes longer."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    if any(process.exitcode is None for process in processes):
        for process in processes:
            process.kill()
        raise AssertionError("\n".join(["it hangs:", *(log.read_text() for log in logs)]))
    return [process.exitcode for process in processes]


def _meeting_point() -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}


def _place(rank: int, num_ranks: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}


def _command(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    from sorted_ds.commands.cli import main

    enter(environment, ROOT, log)
    with mock.patch("sorted_ds.commands.train.launch", _launch):
        leave(lambda: main(["train", *arguments]))


def _launch(module: Sequence[str], num_ranks: int) -> int:
    """Takes the place of `launcher.launch`."""
    from sorted_ds.run.train import main

    os.environ.update(_meeting_point(), DS_ACCELERATOR="cpu")
    fork = get_context("fork")
    places = [_place(rank, num_ranks) for rank in range(num_ranks)]
    ranks = [fork.Process(target=_rank, args=(place, lambda: main(module[1:]))) for place in places]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return next((rank.exitcode for rank in ranks if rank.exitcode), 0)


def _script(script: Path, arguments: list[str], environment: dict[str, str], log: Path) -> None:
    enter(environment, ROOT, log)
    sys.argv = [str(script), *arguments]
    _rank({}, lambda: runpy.run_path(str(script), run_name="__main__"))


def _rank(place: dict[str, str], work: Callable[[], int]) -> None:
    """Does what `python -m sorted_ds.commands.rank` does."""
    from sorted_ds.cluster import stop
    from sorted_ds.run import parts

    os.environ.update(place)
    stop.START_TIME, parts.PARENT_PID = time.monotonic(), os.getppid()  # as if imported now
    stop.listen()
    leave(work)
