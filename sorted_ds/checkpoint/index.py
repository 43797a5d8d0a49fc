"""checkpoint.json, the index of a checkpoint: what it belongs to, and how damage to its files is noticed.

In: a checkpoint's folder. Out: an `Index`, or what is damaged. On disk: one JSON file, which lists the size and the
checksum of every other file, and has a checksum of its own.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from sorted_ds.base.errors import UserError
from sorted_ds.base.files import sync
from sorted_ds.checkpoint.background import Task, wait_for_ranks
from sorted_ds.checkpoint.folders import checkpoint_name
from sorted_ds.checkpoint.shard_files import sha256_of
from sorted_ds.cluster.ranks import Ranks

INDEX = "checkpoint.json"
FORMAT = 2
SECONDS_TO_APPEAR = 30.0
"""How long a shared file system may take to show one host what another host wrote."""


class DamagedError(Exception):
    """A checkpoint is damaged; the message says how."""


@dataclass(frozen=True)
class Index:
    """The fields of checkpoint.json, except `sha256`, which is the checksum of all others."""

    step: int
    optimizer_steps: int
    num_ranks: int
    seconds: float
    """Time from the start of the save until every rank's files were written."""
    state_keys: list[str]
    identity: dict[str, str]
    files: dict[str, dict]
    """Size in bytes and sha256 of each file, by name."""
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Writes checkpoint.json and syncs it. Raises: OSError."""
        path, contents = folder / INDEX, asdict(self)
        path.write_text(json.dumps({**contents, "sha256": _sha256_of(contents)}, indent=1))
        sync(path)
        sync(folder)

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """Returns the index of a checkpoint.

        Raises: DamagedError; UserError when another version wrote the file, or it cannot be read.
        """
        path = folder / INDEX
        if not wait_for(path.exists):
            raise DamagedError(f"{folder} has no {INDEX}")
        try:
            contents = json.loads(path.read_bytes())
            if contents["format"] != FORMAT:
                raise UserError(
                    f"{path} has format {contents['format']}, but this version reads format {FORMAT}. Set another "
                    "run_dir."
                )
            if contents.pop("sha256") != _sha256_of(contents):
                raise DamagedError(f"{path} has changed since it was written")
            index = cls(**{field.name: contents[field.name] for field in fields(cls)})
        except OSError as error:
            raise _unreadable_error(path, error) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{path} is damaged ({error!r})") from None
        if folder.name != checkpoint_name(index.step):
            raise DamagedError(f"{path} belongs to step {index.step}, not to {folder.name}")
        return index

    def check_sizes(self, folder: Path) -> None:
        """Checks that every file exists and has its size. Raises: DamagedError; UserError when one cannot be read."""
        for name, expected in self.files.items():
            path = folder / name
            if not wait_for(path.exists):
                raise DamagedError(f"{path} is missing")
            try:
                num_bytes = path.stat().st_size
            except OSError as error:
                raise _unreadable_error(path, error) from None
            if num_bytes != expected["bytes"]:
                raise DamagedError(f"{path} has {num_bytes} bytes, but {expected['bytes']} were written")

    def find_changed_file(self, folder: Path, ranks: Ranks, heartbeat: Callable[[], None]) -> str:
        """Returns a text that names the first file whose checksum differs, or "". Every rank must call this.

        Each rank reads a part of the files, and `heartbeat` is called meanwhile.

        Raises: AgreedError when a file cannot be read.
        """
        own, chunks = list(self.files)[ranks.rank :: ranks.size], list[int]()

        def checksum(name: str) -> str:
            wait_for((folder / name).exists)
            return sha256_of(folder / name, chunks.append)

        task = Task(lambda: {name: checksum(name) for name in own})
        wait_for_ranks(ranks, task, lambda: len(chunks), heartbeat)
        changed: list[str] = []
        with ranks.fail_together():
            try:
                changed = [name for name, found in task.result().items() if found != self.files[name]["sha256"]]
            except OSError as error:
                raise _unreadable_error(Path(error.filename or folder), error) from None
        first = next(filter(None, ranks.gather(" ".join(changed[:1]))), "")
        return f"{folder / first} has changed since it was written" if first else ""


def checkpoint_fingerprint(folder: Path) -> str:
    """Returns the checksum of checkpoint.json, which holds the checksums of all other files. Raises: OSError."""
    return sha256_of(folder / INDEX)


def appear_deadline() -> float:
    """Returns the `time.monotonic` after which a file that is not seen counts as missing."""
    return time.monotonic() + SECONDS_TO_APPEAR


def wait_for(is_true: Callable[[], bool]) -> bool:
    """Waits until the condition is true, at most `SECONDS_TO_APPEAR`. Returns whether it became true."""
    deadline = appear_deadline()
    while not (found := is_true()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def wait_for_files(hidden: Path, files: dict[str, dict]) -> None:
    """Waits until rank 0 sees what all ranks have written. Raises: OSError when a file stays invisible."""
    for name, facts in files.items():
        if not wait_for(partial(_has_bytes, hidden / name, facts["bytes"])):
            raise OSError(f"rank 0 does not see {name}. Put run_dir on a file system that all ranks see")


def _has_bytes(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def _unreadable_error(path: Path, error: OSError) -> UserError:
    """Returns the error for a file that this host cannot read. It is no `DamagedError`: the file may be intact."""
    return UserError(f"{path} cannot be read: {error.strerror}. Make it readable, and start the run again.")


def _sha256_of(contents: dict) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
