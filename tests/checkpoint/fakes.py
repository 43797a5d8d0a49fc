"""A small stand-in for the engine, so that checkpoints are tested without a network; and writes that can be delayed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from sorted_ds.checkpoint import shard_files
from sorted_ds.cluster.ranks import Ranks
from sorted_ds.engine.shards import Shard

NUM_ELEMENTS = 12


class FakeEngine:
    """Every rank holds one weight and its moment whole, and owns a share of both. `buffers` are any tensors."""

    def __init__(self, ranks: Ranks, value: float, buffers: dict[str, Tensor]):
        self._ranks, self._buffers = ranks, buffers
        self.weight, self.moment = torch.full((NUM_ELEMENTS,), value), torch.full((NUM_ELEMENTS,), value / 2)
        self.steps_taken = 0
        self.is_published = False

    def shards(self, disjoint: bool = False) -> Iterator[Shard]:
        shard = Shard("w", 0, NUM_ELEMENTS, self.weight, 0)
        yield shard.share(self._ranks.rank, self._ranks.size) if disjoint else shard

    def state_of(self, shard: Shard) -> dict[str, Tensor]:
        return {"exp_avg": shard.view(self.moment)}

    def weight_positions(self) -> dict[str, tuple[str, int]]:
        return {"w": ("w", 0)}

    def buffers(self) -> dict[str, Tensor]:
        return self._buffers

    def restore(self, steps_taken: int, state_keys: list[str]) -> None:
        assert state_keys == ["exp_avg"]
        self.steps_taken = steps_taken

    def load_buffers(self, buffers: dict[str, Tensor]) -> None:
        assert buffers.keys() == self._buffers.keys()
        for name, value in buffers.items():
            self._buffers[name].copy_(value)

    def publish(self) -> None:
        self.is_published = True


@contextmanager
def delayed_writes() -> Iterator[threading.Event]:
    """Holds back the writing of checkpoints until the event that this yields is set."""
    event, write = threading.Event(), shard_files.write_file

    def late(*args):
        event.wait()
        return write(*args)

    with mock.patch("sorted_ds.checkpoint.checkpoints.write_file", late):
        yield event
