"""Writing while training goes on: a copy of what is written, and a thread that writes it.

In: this rank's tensors. Out: the same values in host memory, until the next copy; and the result of some work, later.
"""

import threading
import traceback
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sorted_ds.cluster.ranks import Ranks

Result = TypeVar("Result")


class Staging:
    """Host memory for one copy, made at the first use and kept: page-locked where the tensors are a GPU's."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The values as they are now, fp32. The copy before is gone. Raises: OSError when there is no memory for it."""
        on_gpu = any(value.is_cuda for value in tensors.values())
        num = sum(map(len, tensors.values()))
        try:
            if len(self._buffer) != num:
                self._buffer = torch.empty(num, pin_memory=on_gpu)
            copies = dict(zip(tensors, self._buffer.split([len(value) for value in tensors.values()]), strict=True))
            for name, value in tensors.items():
                copies[name].copy_(value, non_blocking=True)
            if on_gpu:
                torch.cuda.synchronize()
        except (RuntimeError, MemoryError) as error:
            raise OSError(f"no host memory for a copy of {4 * num} bytes: {str(error).splitlines()[0]}") from None
        return copies


def wait_for_all(ranks: Ranks, task: "Task", progress: Callable[[], float], heartbeat: Callable[[], None]) -> None:
    """Until every rank's task is done. As long as one of them makes progress nothing hangs. A collective."""
    before = -1.0
    while True:
        num_done, now = ranks.sum([task.is_done(seconds=1.0), progress()])
        if num_done == ranks.size:
            return
        if now > before:
            before = now
            heartbeat()


class Task(Generic[Result]):
    """Some work in a thread of its own. A process that ends does not wait for it."""

    def __init__(self, work: Callable[[], Result]):
        """Starts it."""
        self._work = work
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except OSError as error:
            self._error = error
        except Exception as error:  # a defect, which all ranks must take alike
            traceback.print_exc()
            self._error = OSError(f"unexpected {error!r}; its traceback is above")

    def is_done(self, seconds: float = 0.0) -> bool:
        """Whether it is, at the latest after so many seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> Result:
        """Waits for it. Raises: OSError, by which it failed."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result
