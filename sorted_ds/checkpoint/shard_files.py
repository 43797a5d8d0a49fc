"""What a rank writes of a checkpoint, and what any rank reads of it.

    rank_0003.safetensors    fp32 tensors named `model.layers.0.mlp.up_proj.weight|4096|exp_avg`

A tensor is a stretch of a flattened weight, from an element's number on: of the weight itself (`weight`) or of a state
of its optimizer. Weights are whole, as in Hugging Face (rows first: `o_proj` and `down_proj` transposed), not the
blocks that a space cuts them into. So any number of ranks, at any stage, with any space, reads just what it holds.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
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
"""Between a weight's name, the first element and the key of its state; in none of them."""


BYTES_AT_ONCE = 2**24


class Sharded(Protocol):
    """What a checkpoint needs of the engine."""

    steps_taken: int

    def shards(self, owned: bool = False) -> Iterator[Shard]: ...

    def state_of(self, shard: Shard) -> dict[str, Tensor]: ...

    def places(self) -> dict[str, tuple[str, int]]: ...

    def restore(self, steps_taken: int, state_keys: list[str]) -> None: ...

    def publish(self) -> None: ...


def file_of(rank: int) -> str:
    return f"rank_{rank:04d}.safetensors"


def tensors_of(engine: Sharded) -> dict[str, Tensor]:
    """What this rank writes: views of the engine's own tensors."""
    places = engine.places()
    found = {}
    for shard in engine.shards(owned=True):
        weight, first = places[shard.name]
        for key, value in {MASTER: shard.view(shard.flat), **engine.state_of(shard)}.items():
            found[f"{weight}{SEPARATOR}{first + shard.start}{SEPARATOR}{key}"] = value
    return found


def state_keys_of(tensors: Iterable[str]) -> list[str]:
    """The keys of the optimizer's state among the tensors' names."""
    return sorted({name.rpartition(SEPARATOR)[2] for name in tensors} - {MASTER})


def write_file(path: Path, tensors: dict[str, Tensor], told: Callable[[int], None]) -> dict:
    """Writes and syncs; returns size and checksum. `told` as in `sha256_of`. Raises: OSError."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from None
    share(path)
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path, told)}


def sha256_of(path: Path, told: Callable[[int], None] = lambda num_bytes: None) -> str:
    """`told` gets the number of bytes that were read, piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(BYTES_AT_ONCE):
            digest.update(piece)
            told(len(piece))
    return digest.hexdigest()


def fill(engine: Sharded, folder: Path, names: Iterable[str], heartbeat: Callable[[], None]) -> None:
    """Copies into every shard that this rank holds the stretches that overlap it, file after file until all is there.

    `heartbeat` is called for each stretch. Raises: UserError when some are missing.
    """
    targets, places = _Targets(), engine.places()
    for shard in engine.shards():
        weight, first = places[shard.name]
        for key, value in {MASTER: shard.view(shard.flat), **engine.state_of(shard)}.items():
            targets.add(weight, key, first + shard.start, value)
    for name in names:
        if targets.num_left:
            with safe_open(folder / name, framework="pt") as file:
                for tensor in file.keys():  # noqa: SIM118, a safe_open is no mapping
                    targets.fill(tensor, file.get_slice(tensor))
                    heartbeat()
    if targets.num_left:
        raise UserError(f"{folder} lacks {targets.num_left} numbers of this run's: it is another model's.")


class _Targets:
    """Where the stretches of a checkpoint go."""

    def __init__(self) -> None:
        self.num_left = 0
        self._targets: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}

    def add(self, weight: str, key: str, first: int, target: Tensor) -> None:
        """`first`: the number of the target's first element in the weight."""
        self._targets.setdefault((weight, key), []).append((first, target))
        self.num_left += len(target)

    def fill(self, name: str, stretch: Any) -> None:
        """`stretch`: a slice of a safetensors file, read where it overlaps."""
        weight, start, key = _parts_of(name)
        for first, target in self._targets.get((weight, key), []):
            begin, end = max(first, start), min(first + len(target), start + stretch.get_shape()[0])
            if begin < end:
                target[begin - first : end - first].copy_(stretch[begin - start : end - start])
                self.num_left -= end - begin


def _parts_of(name: str) -> tuple[str, int, str]:
    weight, start, key = name.split(SEPARATOR)
    return weight, int(start), key


def read_master_weights(folder: Path) -> dict[str, Tensor]:
    """The full fp32 master weights of a checkpoint, under Hugging Face's names, flattened (rows first)."""
    pieces: dict[str, dict[int, Tensor]] = {}
    for path in sorted(folder.glob("rank_*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                weight, start, key = _parts_of(name)
                if key == MASTER:
                    pieces.setdefault(weight, {})[start] = file.get_tensor(name)
    return {weight: torch.cat([found[start] for start in sorted(found)]) for weight, found in pieces.items()}
