"""The rank files of a checkpoint: what each rank writes, and what any rank reads of them.

    rank_0003.safetensors    fp32 tensors named `model.layers.0.mlp.up_proj.weight|4096|exp_avg`

In: the engine's shards. Out: shards that are filled from a checkpoint. On disk: each tensor is a range of a flattened
weight, or of the optimizer's state of that weight. Its name holds the weight's name, the number of the range's first
element, and `weight` or the state's key. Weights are those of Hugging Face, not the blocks that a space cuts them into,
and are numbered rows first (`o_proj` and `down_proj` transposed). So any number of ranks, at any stage, with any space,
reads only the ranges that it holds.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sorted_ds.base.errors import UserError
from sorted_ds.base.files import share, sync
from sorted_ds.engine.shards import MASTER, Shard

SEPARATOR = "|"
"""Separates the three parts of a tensor's name. None of them contains it."""
CHUNK_BYTES = 2**24


class Sharded(Protocol):
    """What a checkpoint needs of the engine. Every rank calls each method."""

    steps_taken: int
    """Number of optimizer steps so far."""

    def shards(self, disjoint: bool = False) -> Iterator[Shard]:
        """Yields this rank's shards of the master weights; with `disjoint`, each element is in one rank's shard."""

    def state_of(self, shard: Shard) -> dict[str, Tensor]:
        """Returns the optimizer's tensors for the shard by key. Writing into them changes the optimizer's state."""

    def weight_positions(self) -> dict[str, tuple[str, int]]:
        """Returns by shard name the Hugging Face weight that it is cut from, and its first element's number in it."""

    def buffers(self) -> dict[str, Tensor]:
        """Returns the model's persistent buffers by name. They have any type and shape, and are equal on all ranks.

        A buffer that belongs to one depth or sub-network has its owner in its name. A checkpoint copies the tensors.
        """

    def restore(self, steps_taken: int, state_keys: list[str]) -> None:
        """Sets the optimizer state to zeros under each of `state_keys`. The shards of it are filled afterwards."""

    def load_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Copies saved buffers into the model: the names and shapes of `buffers()`, on the CPU, in the saved type.

        A floating-point type may differ from the model's. Without buffers the dictionary is empty.
        """

    def publish(self) -> None:
        """Is called last: the forward pass uses the restored weights from now on."""


def rank_file(rank: int) -> str:
    """Returns the name of a rank's file."""
    return f"rank_{rank:04d}.safetensors"


def tensors_to_save(engine: Sharded) -> dict[str, Tensor]:
    """Returns what this rank writes, by name. The tensors are views of the engine's."""
    positions = engine.weight_positions()
    found = {}
    for shard in engine.shards(disjoint=True):
        weight, first = positions[shard.name]
        for key, value in {MASTER: shard.view(shard.flat), **engine.state_of(shard)}.items():
            found[f"{weight}{SEPARATOR}{first + shard.start}{SEPARATOR}{key}"] = value
    return found


def state_keys_of(tensors: Iterable[str]) -> list[str]:
    """Returns the keys of the optimizer's state that occur in the tensors' names, sorted."""
    return sorted({name.rpartition(SEPARATOR)[2] for name in tensors} - {MASTER})


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError for a tensor with a number that is not finite: a run that resumed from it could not go on."""
    for name, value in tensors.items():
        if value.numel() and not all(torch.isfinite(end) for end in torch.aminmax(value)):
            weight, _, key = name.split(SEPARATOR)
            raise UserError(f"{key} of {weight} has a number that is not finite")


def write_file(path: Path, tensors: dict[str, Tensor], on_chunk: Callable[[int], None]) -> dict:
    """Writes and syncs a file; returns its size and checksum. `on_chunk` as in `sha256_of`. Raises: OSError."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from None
    share(path)
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path, on_chunk)}


def sha256_of(path: Path, on_chunk: Callable[[int], None] = lambda num_bytes: None) -> str:
    """Returns a file's checksum. `on_chunk` is called with the size of each chunk that was read. Raises: OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            on_chunk(len(chunk))
    return digest.hexdigest()


def load_shards(engine: Sharded, folder: Path, names: Iterable[str], heartbeat: Callable[[], None]) -> None:
    """Fills every shard that this rank holds. Reads one rank file after the other, until all elements are found.

    `heartbeat` is called for each tensor. Raises: UserError when elements are missing.
    """
    missing, positions = _MissingRanges(), engine.weight_positions()
    for shard in engine.shards():
        weight, first = positions[shard.name]
        for key, value in {MASTER: shard.view(shard.flat), **engine.state_of(shard)}.items():
            missing.add(weight, key, first + shard.start, value)
    for name in names:
        if missing.num_elements:
            with safe_open(folder / name, framework="pt") as file:
                for tensor in file.keys():  # noqa: SIM118, a safe_open is no mapping
                    missing.fill(tensor, file.get_slice(tensor))
                    heartbeat()
    if missing.num_elements:
        raise UserError(
            f"{folder} lacks {missing.num_elements} elements of this run's weights, so it belongs to another model. "
            "Set another run_dir, or make the run file as it was."
        )


class _MissingRanges:
    """The ranges of weights and optimizer state that still have to be read from a checkpoint."""

    def __init__(self) -> None:
        self.num_elements = 0
        self._tensors: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}

    def add(self, weight: str, key: str, first: int, tensor: Tensor) -> None:
        """Adds a tensor to be filled. `first` is the number of its first element in the weight."""
        self._tensors.setdefault((weight, key), []).append((first, tensor))
        self.num_elements += len(tensor)

    def fill(self, name: str, saved: Any) -> None:
        """Copies the parts that overlap `saved`, a slice of a safetensors file. Only they are read."""
        weight, start, key = _parse_name(name)
        for first, tensor in self._tensors.get((weight, key), []):
            begin, end = max(first, start), min(first + len(tensor), start + saved.get_shape()[0])
            if begin < end:
                tensor[begin - first : end - first].copy_(saved[begin - start : end - start])
                self.num_elements -= end - begin


def _parse_name(name: str) -> tuple[str, int, str]:
    """Returns the weight's name, the number of the first element, and the key."""
    weight, start, key = name.split(SEPARATOR)
    return weight, int(start), key


def read_master_weights(folder: Path) -> dict[str, Tensor]:
    """Returns a checkpoint's full fp32 master weights by Hugging Face name, flattened rows first."""
    ranges: dict[str, dict[int, Tensor]] = {}
    for path in sorted(folder.glob("rank_*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                weight, start, key = _parse_name(name)
                if key == MASTER:
                    ranges.setdefault(weight, {})[start] = file.get_tensor(name)
    return {weight: torch.cat([found[start] for start in sorted(found)]) for weight, found in ranges.items()}
