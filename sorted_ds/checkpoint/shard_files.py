"""What a rank writes of a checkpoint, and what any rank reads of it.

    rank_0003.safetensors    fp32 tensors named `model.layers.0.mlp.up_proj.weight|4096|exp_avg`

A tensor is a stretch of a flattened weight, from an element's number on: of the weight itself (`weight`) or of a state
of its optimizer. Weights are whole, as in Hugging Face (rows first: `o_proj` and `down_proj` transposed), not the
blocks that a space cuts them into. So any number of ranks, at any stage, with any space, reads just what it holds.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sorted_ds.engine.shards import MASTER, Shard
from sorted_ds.errors import UserError
from sorted_ds.files import share, sync

SEPARATOR = "|"
"""Between a weight's name, the first element and the key of its state; in none of them."""


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


def write_file(path: Path, tensors: dict[str, Tensor]) -> dict:
    """Writes and syncs; returns size and checksum. Raises: OSError."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from None
    share(path)
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class _Piece:
    """Where a stretch of a weight lies: the open file, its tensor's name, its first element's number, its length."""

    file: safe_open
    name: str
    start: int
    num: int


def _pieces(paths: Iterable[Path]) -> dict[tuple[str, str], list[_Piece]]:
    """By weight and key."""
    pieces: dict[tuple[str, str], list[_Piece]] = {}
    for path in paths:
        file = safe_open(path, framework="pt")
        for name in file.keys():  # noqa: SIM118, a safe_open is no mapping
            weight, start, key = name.split(SEPARATOR)
            num = file.get_slice(name).get_shape()[0]
            pieces.setdefault((weight, key), []).append(_Piece(file, name, int(start), num))
    return pieces


def fill(engine: Sharded, paths: Iterable[Path]) -> None:
    """Copies into every shard that this rank holds the stretches that overlap it.

    Raises: UserError when some are missing.
    """
    pieces, places = _pieces(paths), engine.places()
    for shard in engine.shards():
        weight, first = places[shard.name]
        for key, value in {MASTER: shard.view(shard.flat), **engine.state_of(shard)}.items():
            filled = _copy(pieces.get((weight, key), []), first + shard.start, value)
            if filled != shard.num:
                raise UserError(
                    f"the checkpoint holds {filled} of {shard.num} elements of {shard.name}: another model's."
                )


def _copy(pieces: list[_Piece], first: int, target: Tensor) -> int:
    """Into `target`, whose first element has the number `first` in the weight. Returns how many were found."""
    filled = 0
    for piece in pieces:
        start, stop = max(first, piece.start), min(first + len(target), piece.start + piece.num)
        if start < stop:
            values = piece.file.get_slice(piece.name)[start - piece.start : stop - piece.start]
            target[start - first : stop - first].copy_(values)
            filled += stop - start
    return filled


def read_master_weights(folder: Path) -> dict[str, Tensor]:
    """The full fp32 master weights of a checkpoint, under Hugging Face's names, flattened (rows first)."""
    whole: dict[str, Tensor] = {}
    for (weight, key), pieces in _pieces(sorted(folder.glob("rank_*.safetensors"))).items():
        if key == MASTER:
            whole[weight] = torch.empty(max(piece.start + piece.num for piece in pieces))
            for piece in pieces:
                whole[weight][piece.start : piece.start + piece.num] = piece.file.get_tensor(piece.name)
    return whole
