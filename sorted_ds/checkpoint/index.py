"""checkpoint.json: what a checkpoint is of, and by what one knows that it is whole."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from sorted_ds.base.errors import UserError
from sorted_ds.base.files import sync
from sorted_ds.checkpoint.background import Task, wait_for_all
from sorted_ds.checkpoint.shard_files import sha256_of
from sorted_ds.checkpoint.waiting import wait_for
from sorted_ds.cluster.ranks import Ranks

INDEX = "checkpoint.json"
FORMAT = 2


class DamagedError(Exception):
    """What is wrong with a checkpoint."""


@dataclass(frozen=True)
class Index:
    """The fields of checkpoint.json, but for `sha256`, which is of all others."""

    step: int
    optimizer_steps: int
    num_ranks: int
    seconds: float
    """From the start of the save until every rank's file was written."""
    state_keys: list[str]
    identity: dict[str, str]
    files: dict[str, dict]
    """Size and sha256 by name."""
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        path, contents = folder / INDEX, asdict(self)
        path.write_text(json.dumps({**contents, "sha256": _sha256_of(contents)}, indent=1))
        sync(path)
        sync(folder)

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """Raises: DamagedError; UserError when another version wrote it, or it cannot be read."""
        path = folder / INDEX
        if not wait_for(path.exists):
            raise DamagedError(f"{folder} has no {INDEX}")
        try:
            told = json.loads(path.read_bytes())
            if told["format"] != FORMAT:
                raise UserError(
                    f"{path} is of format {told['format']}, and this version reads {FORMAT}. Set another run_dir."
                )
            if told.pop("sha256") != _sha256_of(told):
                raise DamagedError(f"{path} was changed since it was written")
            index = cls(**{field.name: told[field.name] for field in fields(cls)})
        except OSError as error:
            raise _unreadable(path, error) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{path} is damaged ({error!r})") from None
        if folder.name != name_of(index.step):
            raise DamagedError(f"{path} is of step {index.step}, which {folder.name} is not")
        return index

    def check_sizes(self, folder: Path) -> None:
        """That every file is there. Raises: DamagedError; UserError when one cannot be read."""
        for name, expected in self.files.items():
            path = folder / name
            if not wait_for(path.exists):
                raise DamagedError(f"{path} is missing")
            try:
                num_bytes = path.stat().st_size
            except OSError as error:
                raise _unreadable(path, error) from None
            if num_bytes != expected["bytes"]:
                raise DamagedError(f"{path} has {num_bytes} bytes, {expected['bytes']} were written")

    def changed_file(self, folder: Path, ranks: Ranks, heartbeat: Callable[[], None]) -> str:
        """What is wrong with the first file whose checksum is another; each rank reads its part. A collective.

        Raises: AgreedError when one cannot be read.
        """
        own, pieces = list(self.files)[ranks.rank :: ranks.size], list[int]()
        task = Task(lambda: {name: sha256_of(folder / name, pieces.append) for name in own})
        wait_for_all(ranks, task, lambda: len(pieces), heartbeat)
        changed: list[str] = []
        with ranks.fail_together():
            try:
                changed = [name for name, found in task.result().items() if found != self.files[name]["sha256"]]
            except OSError as error:
                raise _unreadable(Path(error.filename or folder), error) from None
        first = next(filter(None, ranks.gather(" ".join(changed[:1]))), "")
        return f"{folder / first} was changed since it was written" if first else ""


def fingerprint(folder: Path) -> str:
    """Of a checkpoint: of its index, which has the checksums of its files. Raises: OSError."""
    return sha256_of(folder / INDEX)


def name_of(step: int) -> str:
    """Of its folder."""
    return f"step_{step:08d}"


def see_all(hidden: Path, files: dict[str, dict]) -> None:
    """Raises: OSError when rank 0 does not see what other ranks wrote."""
    for name, facts in files.items():
        if not wait_for(partial(_has_bytes, hidden / name, facts["bytes"])):
            raise OSError(f"rank 0 does not see {name}. Put run_dir on a file system that all ranks see")


def _has_bytes(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def _unreadable(path: Path, error: OSError) -> UserError:
    """Not damage: it may be whole, and only this host cannot reach it."""
    return UserError(f"{path} cannot be read: {error.strerror}. Mend that, and start the run again.")


def _sha256_of(contents: dict) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
