"""Counts the bytes of the tensors that exist, at any time and on any device.

A dispatch mode sees the result of every tensor operation, in the backward pass too; each storage counts once, from when
it is first seen until it is freed (a weak reference tells, so what autograd or C++ alone holds counts as well). What a
kernel allocates and frees inside itself is not seen, and a slice of a mapped file counts as if it were memory.
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`now`: bytes of live tensors that were made since the mode is on. `peak`: the most since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def restart(self) -> None:
        """The peak is what is live now."""
        self.peak = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key, nbytes)

    def _freed(self, key: int, nbytes: int) -> None:
        self._seen.remove(key)
        self.now -= nbytes
