"""Work beside training: a copy of the tensors that are written, and a thread that writes them.

In: this rank's tensors, and functions to run. Out: the copies, which stay valid until the next copy; the functions'
results, when they are done. Nothing is on disk.
"""

import threading
import traceback
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sorted_ds.base.errors import UserError
from sorted_ds.cluster.ranks import Ranks

Result = TypeVar("Result")


class Staging:
    """Host memory for one copy, allocated at the first copy and kept. It is page-locked for tensors of a GPU."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns fp32 copies of flat tensors. They overwrite the last copies. Raises: OSError when memory is short."""
        on_gpu = any(value.is_cuda for value in tensors.values())
        num = sum(map(len, tensors.values()))
        try:
            if len(self._memory) != num:
                self._memory = torch.empty(num, pin_memory=on_gpu)
            copies = dict(zip(tensors, self._memory.split([len(value) for value in tensors.values()]), strict=True))
            for name, value in tensors.items():
                copies[name].copy_(value, non_blocking=True)
            if on_gpu:
                torch.cuda.synchronize()
        except (RuntimeError, MemoryError) as error:
            raise OSError(f"no host memory for a copy of {4 * num} bytes: {str(error).splitlines()[0]}") from None
        return copies


def wait_for_ranks(ranks: Ranks, task: "Task", progress: Callable[[], float], heartbeat: Callable[[], None]) -> None:
    """Waits until every rank's task is done. Every rank must call this.

    Each rank calls `heartbeat` whenever the sum of all ranks' `progress` has grown, so a slow rank is not taken for a
    hanging one.
    """
    last = -1.0
    while True:
        num_done, now = ranks.sum([task.is_done(wait_seconds=1.0), progress()])
        if num_done == ranks.size:
            return
        if now > last:
            last = now
            heartbeat()


class Task(Generic[Result]):
    """A function that runs in a thread. The process may end before the function has returned."""

    def __init__(self, work: Callable[[], Result]):
        """Starts the thread."""
        self._work = work
        self._error: UserError | OSError | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except (UserError, OSError) as error:
            self._error = error
        except Exception as error:  # a programming error: all ranks must learn of it
            traceback.print_exc()
            self._error = OSError(f"unexpected {error!r}; its traceback is above")

    def is_done(self, wait_seconds: float = 0.0) -> bool:
        """Waits at most `wait_seconds` for the function to return. Returns whether it has."""
        self._thread.join(wait_seconds)
        return not self._thread.is_alive()

    def result(self) -> Result:
        """Waits for the function and returns its result. Raises: UserError or OSError when the function has failed."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result
