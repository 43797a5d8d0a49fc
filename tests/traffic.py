"""Counts what goes through DeepSpeed's collectives, while it happens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import deepspeed
import torch

KINDS = {
    "gather": ("all_gather", "all_gather_into_tensor", "all_gather_base", "all_gather_coalesced"),
    "reduce": ("all_reduce", "reduce", "inference_all_reduce", "all_reduce_coalesced"),
    "scatter": ("reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_base"),
    "broadcast": ("broadcast", "broadcast_object_list"),
}
"""Methods of DeepSpeed's backend. Those that another one calls in its place are not listed: they would count twice."""


@dataclass
class Traffic:
    """Calls and bytes of each kind: of the whole tensor that is gathered into, reduced, or broadcast."""

    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    @property
    def reduced(self) -> int:
        """Bytes of gradients, all-reduced or reduce-scattered."""
        return self.bytes["reduce"] + self.bytes["scatter"]

    @property
    def gathered(self) -> int:
        return self.bytes["gather"]


@contextmanager
def counted() -> Iterator[Traffic]:
    """Every collective of this rank inside the context."""
    traffic, backend = Traffic(), deepspeed.comm.comm.cdb
    patches = [
        mock.patch.object(backend, name, _counting(getattr(backend, name), kind, traffic))
        for kind, names in KINDS.items()
        for name in names
        if hasattr(backend, name)
    ]
    for patch in patches:
        patch.start()
    try:
        yield traffic
    finally:
        for patch in patches:
            patch.stop()


def _counting(original, kind: str, traffic: Traffic):
    def call(*args, **kwargs):
        traffic.calls[kind] += 1
        traffic.bytes[kind] += max(map(num_bytes, (*args, *kwargs.values())), default=0)
        return original(*args, **kwargs)

    return call


def num_bytes(value) -> int:
    """The bytes of a tensor or of a list of tensors; anything else has none."""
    if isinstance(value, list | tuple):
        return sum(map(num_bytes, value))
    return value.nbytes if isinstance(value, torch.Tensor) else 0
