"""Checkpoints: complete or invisible, and independent of ZeRO stage and number of ranks.

    RUN_DIR/checkpoints/step_00000200/
        rank_0000.safetensors ...   its shards: fp32 master weights and optimizer state, flat, by parameter name
        checkpoint.json             step, ranks, state keys, the run's fingerprint, size and sha256 of each file

Written into a hidden folder, synced, then renamed: a killed run leaves either the whole checkpoint or none. A shard is
(parameter, start, values) of the flattened parameter, so any number of ranks at any stage reads just what it holds.
The step is the only cursor: rows, draws and learning rate follow from it. Nothing is pickled.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sorted_ds.engine.shards import MASTER, Shard
from sorted_ds.errors import AgreedError, UserError
from sorted_ds.files import sync
from sorted_ds.ranks import Ranks

INDEX = "checkpoint.json"
FORMAT = 1
SEPARATOR = "|"
"""Between a parameter's name and the key of its state; in no parameter's name."""


class Sharded(Protocol):
    """What a checkpoint needs of the engine."""

    steps_taken: int

    def shards(self, owned: bool = False) -> Iterator[Shard]: ...

    def state_of(self, shard: Shard) -> dict[str, Tensor]: ...

    def restore(self, steps_taken: int, state_keys: list[str]) -> None: ...

    def publish(self) -> None: ...


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run."""

    folder: Path
    keep_last: int
    fingerprint: dict[str, str]
    """What defines the run's result, key by key: another run's checkpoints are refused by it."""
    ranks: Ranks

    def save(self, engine: Sharded, step: int) -> Path:
        """Writes, publishes, then deletes what is older than the last `keep_last`. A collective.

        Raises: UserError on every rank when any rank could not write; nothing is left but the older checkpoints.
        """
        final, hidden = self.folder / f"step_{step:08d}", self.folder / f".writing_step_{step:08d}"
        try:
            with self.ranks.together():
                if self.ranks.is_first:
                    shutil.rmtree(hidden, ignore_errors=True)
                    hidden.mkdir(parents=True)
            with self.ranks.together():
                own, state_keys = self._write_shards(engine, hidden)
            written = self.ranks.gather(json.dumps(own))
            with self.ranks.together():
                if self.ranks.is_first:
                    files = {name: facts for text in written for name, facts in json.loads(text).items()}
                    self._write_index(hidden, step, engine.steps_taken, state_keys, files)
                    self._publish(hidden, final)
        except UserError as error:
            if self.ranks.is_first:
                shutil.rmtree(hidden, ignore_errors=True)
            raise AgreedError(
                f"step {step}: the checkpoint could not be written: {error}. {self.last_good()}"
            ) from None
        return final

    def restore_latest(self, engine: Sharded) -> int:
        """Loads the newest checkpoint into the engine and returns its step; 0 when there is none. A collective.

        Raises: UserError when it is damaged, or was written by another run.
        """
        with self.ranks.together():
            complete = self.complete()
        self._check_all_see(complete[-1].name if complete else "none")
        with self.ranks.together():
            index = self._checked_index(complete[-1]) if complete else None
            if index is not None:
                self._check_files(complete[-1], index)
        if index is None:
            return 0
        engine.restore(index["optimizer_steps"], index["state_keys"])
        with self.ranks.together():
            _fill(engine, complete[-1], index)
        engine.publish()
        return index["step"]

    def _check_all_see(self, newest: str) -> None:
        """Raises: AgreedError when ranks see different ones: they would restore different steps, and hang."""
        for rank, other in enumerate(seen := self.ranks.gather(newest)):
            if other != seen[0]:
                raise AgreedError(
                    f"{self.folder}: rank {rank} sees the checkpoint {other} as the newest, rank 0 {seen[0]}. Put "
                    "run_dir on a file system that all ranks see, or start again when it has settled."
                )

    def complete(self) -> list[Path]:
        """The published checkpoints, oldest first."""
        return sorted(self.folder.glob("step_*"))

    def last_good(self) -> str:
        """A sentence for an error message."""
        complete = self.complete()
        return f"Last good checkpoint: {complete[-1]}." if complete else "There is no earlier checkpoint."

    def _write_shards(self, engine: Sharded, folder: Path) -> tuple[dict[str, dict], list[str]]:
        """This rank's file, with its size and checksum, and the keys of the optimizer's state."""
        tensors: dict[str, Tensor] = {}
        starts: dict[str, str] = {}
        state_keys: set[str] = set()
        for shard in engine.shards(owned=True):
            values = {MASTER: shard.view(shard.flat), **engine.state_of(shard)}
            state_keys.update(values)
            for key, value in values.items():
                tensors[f"{shard.name}{SEPARATOR}{key}"] = value.contiguous()
            starts[shard.name] = str(shard.start)
        path = folder / f"rank_{self.ranks.rank:04d}.safetensors"
        try:
            save_file(tensors, path, metadata=starts)
        except SafetensorError as error:
            raise OSError(f"{path.name}: {error}") from None
        sync(path)
        facts = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        return {path.name: facts}, sorted(state_keys - {MASTER})

    def _write_index(
        self, folder: Path, step: int, optimizer_steps: int, state_keys: list[str], files: dict[str, dict]
    ) -> None:
        index = {
            "format": FORMAT,
            "step": step,
            "optimizer_steps": optimizer_steps,
            "num_ranks": self.ranks.size,
            "state_keys": state_keys,
            "fingerprint": self.fingerprint,
            "files": files,
        }
        path = folder / INDEX
        path.write_text(json.dumps(index, indent=1))
        sync(path)
        sync(folder)

    def _publish(self, hidden: Path, final: Path) -> None:
        if final.exists():
            _delete(final)
        hidden.rename(final)
        sync(self.folder)
        for left in self.folder.glob(".deleting_*"):
            shutil.rmtree(left, ignore_errors=True)
        for old in self.complete()[: -self.keep_last]:
            _delete(old)

    def _checked_index(self, folder: Path) -> dict:
        path = folder / INDEX
        if not path.is_file():
            raise UserError(f"{folder} has no {INDEX}. Delete the folder to go on from the one before.")
        try:
            index = json.loads(path.read_text())
            there, found_format = index["fingerprint"], index["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is damaged ({error!r}). Delete {folder.name} to go on from the one before."
            ) from None
        if found_format != FORMAT:
            raise UserError(
                f"{path} is of format {found_format}, and this version reads {FORMAT}. Set another run_dir."
            )
        keys = dict.fromkeys([*self.fingerprint, *there])
        differing = [key for key in keys if there.get(key) != self.fingerprint.get(key)]
        if differing:
            key = differing[0]
            more = f" (and {len(differing) - 1} more keys)" if len(differing) > 1 else ""
            raise UserError(
                f"{self.folder} belongs to another run: {key} = {there.get(key)} there, {self.fingerprint.get(key)} "
                f"here{more}. Set another run_dir, or make the run file as it was."
            )
        return index

    def _check_files(self, folder: Path, index: dict) -> None:
        """Presence and size of every file on every rank; each file's checksum on one rank."""
        for number, (name, expected) in enumerate(index["files"].items()):
            path = folder / name
            if not path.is_file():
                raise UserError(f"{path} is missing. Delete {folder.name} to go on from the one before.")
            if path.stat().st_size != expected["bytes"]:
                raise UserError(
                    f"{path} has {path.stat().st_size} bytes, {expected['bytes']} were written. "
                    f"Delete {folder.name} to go on from the one before."
                )
            if number % self.ranks.size == self.ranks.rank and _sha256(path) != expected["sha256"]:
                raise UserError(
                    f"{path} was changed since it was written. Delete {folder.name} to go on from the one before."
                )


@dataclass(frozen=True)
class _Piece:
    """Where a stretch of a flattened parameter lies: the open file, and its first element's number."""

    file: safe_open
    start: int
    num: int


def _fill(engine: Sharded, folder: Path, index: dict) -> None:
    """Copies into every shard that this rank holds the stretches that overlap it."""
    pieces = _pieces(folder / name for name in index["files"])
    for shard in engine.shards():
        values = {MASTER: shard.view(shard.flat), **engine.state_of(shard)}
        for key, value in values.items():
            _copy(pieces.get(shard.name, []), shard, key, value)


def _pieces(paths: Iterable[Path]) -> dict[str, list[_Piece]]:
    pieces: dict[str, list[_Piece]] = {}
    for path in paths:
        file = safe_open(path, framework="pt")
        for name, start in (file.metadata() or {}).items():
            num = file.get_slice(f"{name}{SEPARATOR}{MASTER}").get_shape()[0]
            pieces.setdefault(name, []).append(_Piece(file, int(start), num))
    return pieces


def _copy(pieces: list[_Piece], shard: Shard, key: str, target: Tensor) -> None:
    filled = 0
    for piece in pieces:
        start, stop = max(shard.start, piece.start), min(shard.start + shard.num, piece.start + piece.num)
        if start < stop:
            values = piece.file.get_slice(f"{shard.name}{SEPARATOR}{key}")[start - piece.start : stop - piece.start]
            target[start - shard.start : stop - shard.start].copy_(values)
            filled += stop - start
    if filled != shard.num:
        raise UserError(f"the checkpoint holds {filled} of {shard.num} elements of {shard.name}: another model's.")


def _delete(folder: Path) -> None:
    """Out of sight first: a kill in the middle leaves no half checkpoint. A failure costs space, never the run."""
    hidden = folder.with_name(f".deleting_{folder.name}")
    try:
        folder.rename(hidden)
    except OSError:
        return
    shutil.rmtree(hidden, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_master_weights(folder: Path) -> dict[str, Tensor]:
    """The full fp32 master weights of a checkpoint, under the nested model's names, flattened."""
    whole: dict[str, Tensor] = {}
    for name, pieces in _pieces(sorted(folder.glob("rank_*.safetensors"))).items():
        whole[name] = torch.empty(max(piece.start + piece.num for piece in pieces))
        for piece in pieces:
            whole[name][piece.start : piece.start + piece.num] = piece.file.get_tensor(f"{name}{SEPARATOR}{MASTER}")
    return whole
